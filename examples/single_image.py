"""One question about one image, and the bytes of its cache.

python examples/single_image.py [IMAGE]
"""

import sys

from PIL import Image

from kvcapsule import Capsule, attach, conversation, encode, load_vlm, output_cache
from kvcapsule.testbeds.pages import page

model, processor = load_vlm("pages-vlm")
capsule = Capsule.from_pretrained("pages-vlm-cross-layer", device=model.device)
image = Image.open(sys.argv[1]) if sys.argv[1:] else page("test", 0).image
inputs = encode(processor, [conversation([image], "Transcribe the page.")], model.dtype).to(model.device)
with attach(model, capsule):
    output = model.generate(**inputs, max_new_tokens=64, return_dict_in_generate=True)

cache = output_cache(output)
print(processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(f"image: {cache.bytes().visual:,} bytes; cache: {cache.bytes().total:,}; full cache: {cache.full_bytes():,}")
