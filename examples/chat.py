"""A chat whose second turn brings a second image: the cache is kept, so the first image is not read again.

python examples/chat.py

pages-vlm was trained on single pages: it misreads a second one, with the full cache as well. What counts is the way.
"""

from kvcapsule import Capsule, CapsuleCache, attach, cache_argument, conversation, encode, load_vlm
from kvcapsule.testbeds.pages import page

model, processor = load_vlm("pages-vlm")
capsule = Capsule.from_pretrained("pages-vlm-cross-layer", device=model.device)
cache = CapsuleCache(model.config, capsule)
turns = []
with attach(model):
    for image, question in ((page("test", 0).image, "Read line 2."), (page("test", 1).image, "Read line 1.")):
        turns += conversation([image], question)
        inputs = encode(processor, [turns], model.dtype).to(model.device)
        if cache.get_seq_length():
            # The whole conversation's token ids, and the pixels of the new image alone.
            inputs["pixel_values"] = inputs["pixel_values"][-1:]
        output = model.generate(**inputs, **cache_argument(cache), max_new_tokens=16)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        print(f"{question} {answer}  ({cache.bytes().visual:,} bytes of images)")
