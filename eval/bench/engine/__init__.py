"""vLLM with capsules against vLLM without, in one memory budget (`python -m kvcapsule.eval.bench.engine`)."""
