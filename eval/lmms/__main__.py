"""Prints the folder of kvcapsule's own tasks: `lmms-eval --include_path "$(python -m kvcapsule.eval.lmms)"`."""

import sys

from .questions import TASKS

sys.stdout.write(f"{TASKS}\n")
