"""A capsule trained on your own questions: a JSON Lines file with one {"image", "question", "answer"} a line.

python examples/train_jsonl.py [FOLDER]

The same with commands: kvcapsule train transform --data.source FOLDER/data.jsonl --output FOLDER/capsule
"""

import json
import sys
from pathlib import Path

from kvcapsule import Capsule
from kvcapsule.cli import main
from kvcapsule.testbeds.pages import pages

folder = Path(sys.argv[1] if sys.argv[1:] else "runs/example")
folder.mkdir(parents=True, exist_ok=True)
rows = []
for i, row in enumerate(pages("train", 56)):  # Your images, questions and answers in their place.
    row["image"].save(folder / f"{i}.png")
    rows.append({"image": f"{i}.png", "question": row["prompt"], "answer": row["answer"]})
(folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))

output = str(folder / "capsule")
words = ["train", "transform", "--data.source", str(folder / "data.jsonl"), "--data.split", "all"]
# So that this takes seconds; a capsule for use wants some hundreds of rows, and these options left out.
words += ["--held-out", "8", "--transform.logit-batches", "0"]
if main([*words, "--codec.tile", "28", "--output", output, "--force"]) == 0:
    capsule = Capsule.from_pretrained(output)
    print(f"{output}: {capsule.config.family}, for {capsule.config.base_model}")
