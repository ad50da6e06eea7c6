"""Scores by edit distance (Levenshtein): of characters, of words, and ANLS.

The error rates are edits per character or word of the right text; the scores are 1 minus them, at least 0, and of
several accepted answers the nearest counts.
"""

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from .target import Target

THRESHOLD = 0.5
"""Similarity below which ANLS is 0."""


def anls(answer: str, target: Target) -> float:
    """Average normalised Levenshtein similarity (arXiv 1905.13648): 1 - edits / length of the longer text, case and
    runs of white space aside; 0 where that is less than a half. At a half exactly it counts, as in the benchmark's
    script; the paper's equation has 0 there."""
    said = " ".join(answer.lower().split())
    likeness = max(
        Levenshtein.normalized_similarity(said, " ".join(right.lower().split())) for right in target.accepted
    )
    return likeness if likeness >= THRESHOLD else 0.0


def character_score(answer: str, target: Target) -> float:
    """1 - edits per character of the nearest accepted answer, at least 0."""
    return max(max(0.0, 1.0 - error_rate(answer.strip(), right)) for right in target.accepted)


def word_score(answer: str, target: Target) -> float:
    """1 - edits per word of the nearest accepted answer, at least 0; words are what white space separates."""
    return max(max(0.0, 1.0 - error_rate(answer.split(), right.split())) for right in target.accepted)


def error_rate(answer: Sequence[str], right: Sequence[str]) -> float:
    """Edits that turn the answer into the right text, per character (of texts) or word (of lists of words) of the right
    text; above 1 for a far too long answer."""
    return Levenshtein.distance(answer, right) / max(1, len(right))
