"""Capsules inside vLLM: an image's blocks of the paged KV cache are given back once it is compressed (docs/serving.md).

Nothing here is imported by `import kvcapsule`. vLLM loads `plugin.register` in each of its processes (entry point
vllm.general_plugins); the rest is chosen by vLLM's options, which `kvcapsule serve` sets:

What vLLM is told: plugin (registers the rest), version, settings (what a user may set, what is refused), budget (memory
divided between blocks and capsules), worker (says which request is in which row), scheduler (with a store, ends a step
with each image), metrics.

In the scheduler's process: connector (vLLM's interface, in both), scheduler_half (which images are compressed, and
into which slots), slots, image_blocks (which blocks lie in tiles), manager (frees blocks), stats.

In a worker: worker_half (compresses, and says what attention reads), pool (capsules in slots of fixed size), rotation,
paged_cache (vLLM's blocks as segments), backend (attention over both).

With an image store: store_settings, model_files (the weights' digest), known_images (looks up), prompt_images (what is
looked up, loaded and saved), span_bytes (a span between bytes, slots and blocks), store_writer.
"""
