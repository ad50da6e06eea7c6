"""A capsule on a model with a LoRA adapter; attach says that the capsule was trained without it.

python examples/peft_adapter.py [ADAPTER]
"""

import sys

from peft import LoraConfig, PeftModel, get_peft_model

from kvcapsule import Capsule, attach, conversation, encode, load_vlm
from kvcapsule.testbeds.pages import page

base, processor = load_vlm("pages-vlm")
if sys.argv[1:]:
    model = PeftModel.from_pretrained(base, sys.argv[1])
else:  # An adapter that is not trained yet changes no answer.
    model = get_peft_model(base, LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj)")).eval()
capsule = Capsule.from_pretrained("pages-vlm-cross-layer", device=base.device)
inputs = encode(processor, [conversation([page("test", 0).image], "Read line 2.")], base.dtype).to(base.device)
# A ModelMismatchWarning, in one line. attach(..., strict=True) refuses instead.
with attach(model, capsule):
    output = model.generate(**inputs, max_new_tokens=16)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
