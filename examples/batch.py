"""Questions about several images in one batch.

python examples/batch.py
"""

from kvcapsule import Capsule, attach, conversation, encode, load_vlm, output_cache
from kvcapsule.testbeds.pages import page

model, processor = load_vlm("pages-vlm")
capsule = Capsule.from_pretrained("pages-vlm-cross-layer", device=model.device)
questions = ["Read line 1.", "Transcribe the page.", "Read line 2."]
conversations = [conversation([page("test", i).image], text) for i, text in enumerate(questions)]
# Prompts of unlike length are padded on the left.
inputs = encode(processor, conversations, model.dtype).to(model.device)
with attach(model, capsule):
    output = model.generate(**inputs, max_new_tokens=64, return_dict_in_generate=True)

answers = processor.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
for question, answer in zip(questions, answers, strict=True):
    print(f"{question} {answer!r}")
print(f"{output_cache(output).bytes().visual:,} bytes for {len(questions)} images")
