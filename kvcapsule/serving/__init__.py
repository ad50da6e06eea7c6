"""Capsules inside vLLM: an image's blocks of the paged KV cache are given back once it is compressed (docs/serving.md).

Nothing here is imported by `import kvcapsule`. vLLM loads `plugin.register` in each of its processes (entry point
vllm.general_plugins); the rest is chosen by vLLM's options, which `kvcapsule serve` sets:

    plugin      registers the attention backend, the KV cache spec with its manager, and the connector
    settings    what a user may set, and what is refused by name
    connector   vLLM's KV connector: SchedulerHalf in the scheduler, WorkerHalf in each worker
    manager     the KV cache manager that frees the blocks of compressed images
    backend     attention that reads capsules and the blocks that are left in one pass
    worker      a worker that tells the connector which request is in which row of a batch
    pool        capsules of all requests in slots of fixed size
"""
