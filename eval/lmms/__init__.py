"""A model for lmms-eval: any VLM of transformers with a capsule, a policy or its full cache (docs/benchmarks.md).

`lmms-eval --model kvcapsule --model_args pretrained=pages-vlm,capsule=pages-vlm-cross-layer --tasks ...`
"""
