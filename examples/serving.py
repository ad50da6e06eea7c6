"""vLLM with capsules, in one process. `kvcapsule serve` starts the same as an OpenAI server (docs/serving.md).

python examples/serving.py    (needs vLLM 0.32 for CPUs)
"""

from vllm import LLM, SamplingParams

from kvcapsule.checkpoints import shipped
from kvcapsule.testbeds.pages import page

if __name__ == "__main__":
    llm = LLM(
        model=str(shipped("pages-vlm")),
        model_impl="transformers",
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        block_size=32,
        kv_cache_memory_bytes=16 * 2**20,
        worker_cls="kvcapsule.serving.worker.CapsuleWorker",
        kv_transfer_config={
            "kv_connector": "CapsuleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"capsule": "pages-vlm-blocks", "pool_bytes": 1_000_000},
        },
    )
    prompts = [
        {"prompt": "<|user|><image>Read line 2.<|assistant|>", "multi_modal_data": {"image": page("test", i).image}}
        for i in range(4)
    ]
    for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16)):
        print(output.outputs[0].text)
