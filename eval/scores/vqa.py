"""VQA accuracy, and the normalisation of answers that belongs to it.

arXiv 1505.00468; the averaging over people is that of VQA 2.0's evaluation (https://visualqa.org/evaluation.html):

    accuracy = mean over the people i of min(1, matches among the answers of the others / 3)

Two things differ from the evaluation's script. It leaves the people's answers as they are where all agree, and compares
them with a normalised one; here both sides are always normalised. And an answer of nothing but articles or punctuation
("A", "?") is not emptied by it, so that "a" and "the" differ.
"""

import re

from .target import Target

PEOPLE = 10
"""Answers of a question in VQA, and in the sets that took over its form (TextVQA, OK-VQA, VizWiz)."""
ENOUGH = 3
"""People who must have given an answer for it to be wholly right."""
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)), strict=True))
_NUMBERS = {"none": "0", **_DIGITS}
_ARTICLES = ("a", "an", "the")
_CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've"
    " he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't"
    " not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll"
    " somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd"
    " there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll"
    " what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's"
    " won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've"
).split()
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTED for i, character in enumerate(word) if character == "'"
}
"""By the word with one apostrophe left out."""
_GROUPED_DIGITS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


def vqa_accuracy(answer: str, target: Target) -> float:
    """The share of people who agree, as above. Of fewer than ten people likewise; of one, 1 if the answer is theirs."""
    said = normalized(answer)
    matches = [normalized(text) == said for text in target.accepted]
    if len(matches) == 1:
        return float(matches[0])
    return sum(min(1.0, (sum(matches) - match) / ENOUGH) for match in matches) / len(matches)


def normalized(text: str) -> str:
    """The answer without case, punctuation and articles, numbers up to ten as digits, apostrophes in their places."""
    line = " ".join(text.split())
    words = _without_punctuation(line).lower().split() or line.lower().split()
    words = [_NUMBERS.get(word, word) for word in words]
    words = [word for word in words if word not in _ARTICLES] or words
    return " ".join(_CONTRACTIONS.get(word, word) for word in words)


def _without_punctuation(line: str) -> str:
    """Signs that stand between two words become a space; beside a space, or in a text with digits in groups (1,000),
    they vanish. Full stops vanish but before a digit."""
    grouped = _GROUPED_DIGITS.search(line) is not None
    bare = line
    for sign in _PUNCTUATION:
        beside_space = f"{sign} " in line or f" {sign}" in line
        bare = bare.replace(sign, "" if grouped or beside_space else " ")
    return _PERIOD.sub("", bare)
