"""What an answer is judged by."""

from typing import NamedTuple

from kvcapsule.data.batches import Question


class Target(NamedTuple):
    """The right answers of a question, without white space around them."""

    accepted: tuple[str, ...]
    """All answers that count as right, one for each person who gave one; at least one."""
    choices: tuple[str, ...] = ()
    """Texts of the options of a multiple-choice question, in their order; empty for any other question."""
    task: str = ""


def target_of(question: Question) -> Target:
    """What the answers to a question are judged by."""
    return Target(tuple(answer.strip() for answer in question.answers), question.choices, question.task)
