"""The connector's half in the scheduler's process: which images are compressed, into which slots, and which blocks that
frees."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .image_blocks import TileRun, tile_runs
from .slots import SlotAllocator
from .stats import Tally


class Compress(NamedTuple):
    """An image that is computed when the step ends: compress it."""

    request: str
    run: TileRun
    slots: list[int]


@dataclass
class Step:
    """What workers are told of a step."""

    compress: list[Compress] = field(default_factory=list)
    forget: list[str] = field(default_factory=list)
    """Requests that are gone, or begin anew: what is known of their capsules no longer holds."""


@dataclass
class _Request:
    pending: list[TileRun]
    """Images not compressed yet, in their order."""
    compressed: list[TileRun] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    exact_tokens: int | None = None
    """Tokens that were computed before any of the request's images was compressed; None: all so far."""
    refused: TileRun | None = None
    """The image that last found the pool full."""


class SchedulerHalf:
    """Follows requests with images from their first step to their last."""

    def __init__(self, block: int, tile: int, slots: int) -> None:
        self.block, self.tile, self.slots = block, tile, SlotAllocator(slots)
        self.requests: dict[str, _Request] = {}
        self.forget: list[str] = []
        self.tally = Tally()
        self.refused = 0
        """Images that stayed in their blocks because the pool was full when they were computed, each counted once."""

    def begin(self, request: str, images: Sequence[tuple[int, int]]) -> None:
        """A request begins, or begins anew after it was preempted.

        Args:
            request: its id.
            images: (first token, number of tokens) of each of its images.
        """
        self.end(request)
        if runs := tile_runs(images, self.block, self.tile):
            self.requests[request] = _Request(runs)

    def end(self, request: str) -> None:
        """A request ends, or loses its blocks."""
        if (known := self.requests.pop(request, None)) is not None:
            self.slots.give_back(known.slots)
            self.forget.append(request)

    def compressed(self, request: str) -> Iterable[TileRun]:
        """The images whose blocks are not needed once the tokens up to their end are computed."""
        known = self.requests.get(request)
        return known.compressed if known else ()

    def exact_tokens(self, request: str) -> int | None:
        """How many of a request's tokens may pass as what the model computes without capsules; None: all."""
        known = self.requests.get(request)
        return known.exact_tokens if known else None

    def step(self, computed: dict[str, int]) -> Step:
        """What workers are to do in the next step.

        Args:
            computed: of each request in the step, its tokens that are computed when the step ends.
        """
        compress = []
        for request, tokens in computed.items():
            known = self.requests.get(request)
            while known and known.pending and known.pending[0].end <= tokens:
                run = known.pending[0]
                slots = self.slots.take(run.tiles)
                if slots is None:
                    if known.refused != run:
                        known.refused = run
                        self.refused += 1
                        self.tally.add("images_left_raw")
                    break
                known.pending.pop(0)
                known.slots += slots
                known.compressed.append(run)
                if known.exact_tokens is None:
                    known.exact_tokens = tokens
                compress.append(Compress(request, run, slots))
        forget, self.forget = self.forget, []
        return Step(compress, forget)


def images_of(request: Any) -> list[tuple[int, int]]:
    """(first token, number of tokens) of each image of one of vLLM's requests; separators cut an image into parts."""
    images: list[tuple[int, int]] = []
    for feature in request.mm_features:
        place = feature.mm_position
        images += [(begin, end + 1 - begin) for begin, end in place.extract_embeds_range()]
    return images
