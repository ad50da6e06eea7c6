"""The functions of the metrics, and the choice among them."""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from kvcapsule.data.batches import Question
from kvcapsule.data.source import MIXED, PAGES, PICTURES
from kvcapsule.testbeds import pages

from . import metric_names
from .metric_names import AUTO, DEMO
from .target import Target, target_of
from .vqa import PEOPLE

Metric = Callable[[str, Target], float]
"""A function of an answer and its target: a score in 0..1."""


def _imported(target: str) -> Metric:
    module, _, function = target.partition(":")
    metric: Metric = getattr(import_module(f".{module}", __package__), function)
    return metric


METRICS = {name: _imported(target) for name, target in metric_names.METRICS.items()}
"""The functions by name."""
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
