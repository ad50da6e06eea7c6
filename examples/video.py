"""A question about a video: its frames are one visual span, which a method compresses as it does an image's.

python examples/video.py [MODEL]

MODEL is a folder or an id on the Hub, of a model that takes videos (docs/models.md); its processor needs torchvision.
"""

import sys

from PIL import Image

from kvcapsule import attach, encode, load_vlm, output_cache
from kvcapsule.policy import Quantized

model, processor = load_vlm(sys.argv[1] if sys.argv[1:] else "Qwen/Qwen2-VL-2B-Instruct")
# Sixteen frames of a square that moves to the right, in place of a file's frames.
frames = [Image.new("RGB", (112, 112), "white") for _ in range(16)]
for i, frame in enumerate(frames):
    frame.paste("red", (6 * i, 46, 6 * i + 20, 66))
parts = [{"type": "video", "video": frames}, {"type": "text", "text": "Where does the square go?"}]
options = {"do_sample_frames": False}
inputs = encode(processor, [[{"role": "user", "content": parts}]], model.dtype, options).to(model.device)
# 4 bits, without training. A capsule for the model is attached in the same way.
with attach(model, Quantized(bits=4)):
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False, return_dict_in_generate=True)

cache = output_cache(output)
print(processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(f"video: {cache.bytes().visual:,} bytes; cache: {cache.bytes().total:,}; full cache: {cache.full_bytes():,}")
