"""Multiple choice: the option that an answer names, by its letter or by its text.

Read in this order: the text of an option; "answer: B" or "answer is (B)", the last one; a letter at the beginning that
stands alone or in marks ("B", "B.", "(B) red", "B: red"); the text of the one option that the answer mentions. An
answer that names no option, or mentions several, is wrong; some benchmarks guess then, which would make scores random.
"""

import re
import string

from .target import Target
from .vqa import normalized

_OPEN, _CLOSE = r"[*\"'(\[]*", r"[*\"')\].:,]"
_ANSWER = re.compile(
    rf"(?i:answer\s*(?:is|:)\s*(?:option\s+)?){_OPEN}([A-Z](?![\w'’])|[a-z](?={_CLOSE}|\s*$))", re.ASCII | re.MULTILINE
)
"""A small letter must end the line or stand before a mark: "the answer is a cat" names no option."""
_ALONE = re.compile(rf"{_OPEN}([A-Za-z]){_CLOSE}*")
_MARKED = re.compile(rf"{_OPEN}([A-Za-z])(?:{_CLOSE}+(?![A-Za-z])|\s*\n)")


def multiple_choice(answer: str, target: Target) -> float:
    """1 if the answer names the option that an accepted answer names, else 0.

    Without the options' texts the letters alone are compared; accepted answers that name no option, as texts.
    """
    choice = chosen(answer, target.choices)
    rights = [(right, chosen(right, target.choices)) for right in target.accepted]
    return float(
        any(normalized(answer) == normalized(right) if best is None else choice == best for right, best in rights)
    )


def chosen(answer: str, choices: tuple[str, ...]) -> int | None:
    """The number of the option that an answer names, from 0; None if it names none.

    choices: texts of the options; without any, letters from A to Z name one each.
    """
    texts = [normalized(choice) for choice in choices]
    said = normalized(answer)
    if said in texts:
        return texts.index(said)
    letters = string.ascii_uppercase[: len(choices) or None]
    for letter in _letters(answer.strip()):
        if letter.upper() in letters:
            return letters.index(letter.upper())
    mentioned = [i for i, text in enumerate(texts) if text and f" {text} " in f" {said} "]
    return mentioned[0] if len(mentioned) == 1 else None


def _letters(answer: str) -> list[str]:
    """Letters that the answer may name an option by, the likeliest first."""
    alone, marked = _ALONE.fullmatch(answer), _MARKED.match(answer)
    return [
        *_ANSWER.findall(answer)[-1:],
        *([alone[1]] if alone else []),
        *([marked[1]] if marked else []),
    ]
