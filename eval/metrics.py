"""How good an answer is, and how far a method's next-token distribution is from the full cache's."""

from collections.abc import Sequence

import torch

TRANSCRIBE = "transcribe"
"""The task whose answers are long texts, scored by their share of right characters; every other task is right or
wrong."""
ALOUD = ("lookup", "count")
"""The tasks whose answers may be worked out aloud: their last word is judged."""


def accuracy(task: str, answer: str, right: str) -> float:
    """Score of one answer in 0..1; white space around it does not count.

    Task "transcribe": 1 - character error rate, at least 0. Any other task: 1 if the answer is the right one, else 0;
    of "lookup" and "count" the last word is the answer, and what comes before it is not judged.
    """
    answer, right = answer.strip(), right.strip()
    if task == TRANSCRIBE:
        return max(0.0, 1.0 - character_error_rate(answer, right))
    if task in ALOUD:
        answer, right = (text.rpartition("\n")[2].rpartition(" ")[2] for text in (answer, right))
    return float(answer == right)


def character_error_rate(answer: str, right: str) -> float:
    """Edits that turn the answer into the right text, per character of the right text; above 1 for an answer that
    rambles on."""
    return edit_distance(answer, right) / max(1, len(right))


def edit_distance(a: Sequence[object], b: Sequence[object]) -> int:
    """Least number of insertions, deletions and substitutions that turn a into b (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def divergence(full_BV: torch.Tensor, method_BV: torch.Tensor) -> torch.Tensor:
    """KL(full || method) in nats of each row's next-token distribution, from logits [B, V]: [B], in float64."""
    full, method = full_BV.double().log_softmax(-1), method_BV.double().log_softmax(-1)
    # Where the full cache gives a token no chance at all, the token adds nothing; 0 * -inf would make it NaN.
    terms = torch.where(full == -torch.inf, 0.0, full.exp() * (full - method))
    return terms.sum(-1).clamp_min(0.0)
