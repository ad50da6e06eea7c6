"""The same question with the full cache, a capsule and policies that need no training.

python examples/compare_policies.py

This shows how methods are attached. One question says nothing about quality: `kvcapsule eval` compares at equal bytes.
"""

from kvcapsule import Capsule, attach, conversation, encode, load_vlm, output_cache
from kvcapsule.policy import EvenlySpaced, Full, PostVisionAttention, Quantized
from kvcapsule.testbeds.pages import page

model, processor = load_vlm("pages-vlm")
methods = {
    "full cache": Full(),
    "cross-layer capsule": Capsule.from_pretrained("pages-vlm-cross-layer", device=model.device),
    "4-bit keys and values": Quantized(bits=4),
    "a tenth by attention": PostVisionAttention(retention=0.1),
    "a tenth, evenly spaced": EvenlySpaced(retention=0.1),
}
inputs = encode(processor, [conversation([page("test", 0).image], "Read line 2.")], model.dtype).to(model.device)
for name, method in methods.items():
    with attach(model, method):
        output = model.generate(**inputs, max_new_tokens=16, return_dict_in_generate=True)
    answer = processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{name:24}{output_cache(output).bytes().visual:>9,} bytes  {answer!r}")
