"""How the demo's own data are judged: by the names of their tasks."""

from .edits import character_score
from .exact import exact
from .target import Target

TRANSCRIBE = "transcribe"
"""The task whose answers are long texts, scored by their share of right characters; other answers are right or
wrong."""
ALOUD = ("lookup", "count")
"""The tasks whose answers may contain the working: their last word is scored."""


def demo_score(answer: str, target: Target) -> float:
    """Task "transcribe": 1 - character error rate, at least 0. Any other task: 1 if the answer is the right one, white
    space around it aside, else 0; of "lookup" and "count" the last word is the answer, and the words before it are not
    scored."""
    if target.task == TRANSCRIBE:
        return character_score(answer, target)
    if target.task in ALOUD:
        return exact(_last_word(answer), target._replace(accepted=tuple(map(_last_word, target.accepted))))
    return exact(answer, target)


def _last_word(text: str) -> str:
    return text.strip().rpartition("\n")[2].rpartition(" ")[2]
