"""The metrics by name, and the choice among them."""

from collections.abc import Callable
from typing import NamedTuple

from kvcapsule.data.batches import Question
from kvcapsule.data.source import MIXED, PAGES, PICTURES
from kvcapsule.testbeds import pages

from .demo import demo_score
from .edits import anls, character_score, word_score
from .exact import exact, relaxed_exact
from .multiple_choice import multiple_choice
from .relaxed_accuracy import relaxed_accuracy
from .target import Target, target_of
from .vqa import PEOPLE, vqa_accuracy

AUTO = "auto"
DEMO = "demo"
METRICS: dict[str, Callable[[str, Target], float]] = {
    "exact": exact,
    "relaxed-exact": relaxed_exact,
    "anls": anls,
    "vqa": vqa_accuracy,
    "relaxed-accuracy": relaxed_accuracy,
    "cer": character_score,
    "wer": word_score,
    "multiple-choice": multiple_choice,
    DEMO: demo_score,
}
"""Functions of an answer and its target: a score in 0..1."""
DEMO_SOURCES = (*pages.HEIGHTS, *PICTURES, MIXED)
"""The sources whose tasks `demo` knows."""


class Score(NamedTuple):
    """How good an answer is."""

    value: float
    """In 0..1; 1 is right."""
    metric: str
    """A name of METRICS."""


class Scorer(NamedTuple):
    """Judges answers to the questions of a source."""

    metric: str = AUTO
    """A name of METRICS, or AUTO, which chooses question by question: `demo` for the demo's sources; else
    multiple-choice where the question has options, vqa where ten people answered it, relaxed-exact otherwise."""
    source: str = PAGES
    """As `SourceConfig.source`."""

    def score(self, question: Question, answer: str) -> Score:
        target = target_of(question)
        metric = self.metric_for(target)
        return Score(METRICS[metric](answer, target), metric)

    def metric_for(self, target: Target) -> str:
        """Name of the metric that judges answers to a question."""
        if self.metric != AUTO:
            return self.metric
        if self.source in DEMO_SOURCES:
            return DEMO
        if target.choices:
            return "multiple-choice"
        return "vqa" if len(target.accepted) == PEOPLE else "relaxed-exact"
