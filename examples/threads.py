"""Two threads serve two capsules from one model: what a thread attaches is its own.

python examples/threads.py
"""

from concurrent.futures import ThreadPoolExecutor

from kvcapsule import Capsule, attach, conversation, encode, load_vlm, output_cache
from kvcapsule.testbeds.pages import page

model, processor = load_vlm("pages-vlm")
inputs = encode(processor, [conversation([page("test", 0).image], "Transcribe the page.")])


def answer(name: str) -> str:
    """The answer with this capsule, and the bytes that the cache took."""
    with attach(model, Capsule.from_pretrained(name)):
        output = model.generate(**inputs, max_new_tokens=64, return_dict_in_generate=True)
    text = processor.decode(output.sequences[0], skip_special_tokens=True).strip().splitlines()[-1]
    return f"{name}: {text!r}, {output_cache(output).bytes().visual:,} bytes of visual KV"


with ThreadPoolExecutor(2) as pool:
    for line in pool.map(answer, ["pages-vlm-cross-layer", "pages-vlm-transform"]):
        print(line)
