"""Answers that are right as they stand, or but for case, punctuation and articles."""

from .target import Target
from .vqa import normalized


def exact(answer: str, target: Target) -> float:
    """1 if the answer is an accepted one, character by character, white space around it aside."""
    return float(answer.strip() in target.accepted)


def relaxed_exact(answer: str, target: Target) -> float:
    """1 if the answer is an accepted one after both were normalised as VQA does: "Red." is "red", "the dog" is "dog",
    "two" is "2"."""
    return float(normalized(answer) in map(normalized, target.accepted))
