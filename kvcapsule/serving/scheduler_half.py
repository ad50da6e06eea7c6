"""The connector's half in the scheduler's process: which images are compressed, into which slots, and which blocks that
frees."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .image_blocks import TileBlocks, tile_blocks
from .prompt_images import Load, Plan, PromptImage, Save
from .slots import SlotAllocator
from .stats import Tally


class Compress(NamedTuple):
    """An image that is computed when the step ends: compress it."""

    request: str
    run: TileBlocks
    slots: list[int]


@dataclass
class Step:
    """What workers are told of a step."""

    compress: list[Compress] = field(default_factory=list)
    load: list[Load] = field(default_factory=list)
    """Before the step's tokens are computed; the others are for when they are."""
    save: list[Save] = field(default_factory=list)
    forget: list[str] = field(default_factory=list)
    """Requests that are gone, or begin anew: what is known of their capsules no longer holds."""


@dataclass
class _Request:
    pending: list[TileBlocks]
    """Images not compressed yet, in their order."""
    compressed: list[TileBlocks] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    exact_tokens: int | None = None
    """Tokens that were computed before any of the request's images was compressed; None: all so far."""
    limit: int | None = None
    """Most tokens that may pass as exact, whatever was computed; None: all."""
    refused: TileBlocks | None = None
    """The image that last found the pool full."""
    unsaved: list[PromptImage] = field(default_factory=list)
    """Images that the store is to get, in their order: each as what the model computes behind the capsules of those
    before it."""


class SchedulerHalf:
    """Follows requests with images from their first step to their last."""

    def __init__(self, block: int, tile: int, slots: int) -> None:
        self.block, self.tile, self.slots = block, tile, SlotAllocator(slots)
        self.requests: dict[str, _Request] = {}
        self.forget: list[str] = []
        self.plans: dict[str, Plan] = {}
        """Of requests that wait, where there is an image store."""
        self.trusts: Callable[[str], bool] | None = None
        """Whether nothing casts doubt on a request's images (KnownImages.trusts); None: there is no image store."""
        self.loads: list[Load] = []
        self.tally = Tally()
        self.refused = 0
        """Images that stayed in their blocks because the pool was full when they were computed, each counted once."""

    def plan(
        self,
        request: str,
        places: Sequence[tuple[int, int]],
        images: Sequence[PromptImage],
        data: Sequence[bytes],
        tokens: range,
    ) -> int:
        """A request that waits may be admitted with images from the store; how many tokens they spare it.

        Nothing is taken for it before `begin`: until then it may be planned again.

        Args:
            request: its id.
            places: (first token, number of tokens) of each of its images.
            images: the same, as the store knows them; none where it is not used.
            data: of the first ones, which the store has.
            tokens: those that are not computed; one is left to compute.
        """
        self.plans.pop(request, None)
        runs = tile_blocks(places, self.block, self.tile)
        if not runs:
            return 0
        missed, free = len(images) - len(data), self.slots.count - self.slots.used
        count, end = 0, 0
        for number, image in enumerate(images[: len(data)], 1):
            free -= image.run.tiles if image.run else 0
            if free < 0 or image.end >= tokens.stop:
                break
            if image.run is not None:
                count, end = number, image.end
        exact = _exact(runs)
        if end <= tokens.start:
            self.plans[request] = Plan(images, [], exact, missed)
            return 0
        self.plans[request] = Plan(images, data[:count], 0, missed)
        return end - tokens.start

    def loading(self, request: str) -> Sequence[TileBlocks]:
        """The tiles that a request gets from the store when it is admitted: their blocks are not needed."""
        plan = self.plans.get(request)
        return plan.runs if plan else ()

    def begin(self, request: str, places: Sequence[tuple[int, int]], loaded: int = 0) -> None:
        """A request begins, or begins anew after it was preempted.

        Args:
            request: its id.
            places: (first token, number of tokens) of each of its images.
            loaded: tokens that it gets from the store, as planned; 0: none.
        """
        plan = self.plans.pop(request, None)
        self.end(request)
        runs = tile_blocks(places, self.block, self.tile)
        if not runs:
            return
        known = self.requests[request] = _Request(runs)
        if plan is None:
            return
        known.unsaved = list(plan.images)
        known.limit = plan.exact_tokens
        if loaded:
            stored = plan.runs
            slots = self.slots.take(sum(run.tiles for run in stored))
            assert slots is not None, "slots were free when the request was planned"
            known.compressed, known.slots, known.exact_tokens = list(stored), slots, 0
            known.pending = [run for run in runs if run not in stored]
            del known.unsaved[: len(plan.data)]
            images = plan.images[: len(plan.data)]
            self.loads.append(Load(request, images, plan.data, list(slots), images[-1].end - loaded))
            self.tally.add("store_hits", len(plan.data))
            self.tally.add("store_read_bytes", sum(map(len, plan.data)))
        if plan.images:
            self.tally.add("store_misses", plan.missed)
        else:
            self.tally.add("store_skipped")

    def resume(self, request: str, places: Sequence[tuple[int, int]]) -> None:
        """A request that gets its input piece by piece goes on with the next one. It has kept its blocks, so it keeps
        its slots; the images of the new piece, none of which is looked up nor saved, are still to be compressed.

        Args:
            request: its id.
            places: (first token, number of tokens) of each of its images, those of earlier pieces included.
        """
        known = self.requests.get(request)
        if known is None:
            self.begin(request, places)
            known = self.requests.get(request)
        if known is None:
            return
        runs = tile_blocks(places, self.block, self.tile)
        known.pending = [run for run in runs if run not in known.compressed]
        if self.trusts is not None and known.limit is None:
            known.limit = _exact(runs)

    def end(self, request: str) -> None:
        """A request ends, or loses its blocks."""
        self.plans.pop(request, None)
        self.loads = [load for load in self.loads if load.request != request]
        if (known := self.requests.pop(request, None)) is not None:
            self.slots.give_back(known.slots)
            self.forget.append(request)

    def compressed(self, request: str) -> Iterable[TileBlocks]:
        """The images whose blocks are not needed once the tokens up to their end are computed."""
        known = self.requests.get(request)
        return known.compressed if known else ()

    def exact_tokens(self, request: str) -> int | None:
        """How many of a request's tokens may pass as what the model computes without capsules; None: all."""
        if (plan := self.plans.get(request)) is not None:
            return plan.exact_tokens
        known = self.requests.get(request)
        if known is None or known.exact_tokens is None:
            return known.limit if known else None
        return known.exact_tokens if known.limit is None else min(known.exact_tokens, known.limit)

    def step(self, computed: dict[str, int]) -> Step:
        """What workers are to do in the next step.

        Args:
            computed: of each request in the step, its tokens that are computed when the step ends.
        """
        compress: list[Compress] = []
        save: list[Save] = []
        for request, tokens in computed.items():
            known, before = self.requests.get(request), len(compress)
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
            if known and known.unsaved and self.trusts is not None and not self.trusts(request):
                known.unsaved.clear()
            if known and known.unsaved:
                save += _saves(request, known, tokens, compress[before:])
        forget, self.forget = self.forget, []
        loads, self.loads = self.loads, []
        return Step(compress, loads, save, forget)


def _exact(runs: Sequence[TileBlocks]) -> int:
    """Tokens of a request that may enter the engine's prefix cache where there is an image store: of the block in which
    an image ends another request could take all tokens of the image without its capsule."""
    return runs[0].end - 1


def _saves(request: str, known: _Request, tokens: int, now: Sequence[Compress]) -> Iterator[Save]:
    """The images that the store gets when the step ends. An image that was not compressed in the step that ended with
    it is none of them, nor is any behind it: they were not computed behind its capsule alone."""
    slots = {job.run: job.slots for job in now}
    while known.unsaved and known.unsaved[0].end <= tokens:
        image = known.unsaved.pop(0)
        if image.run is None:
            yield Save(request, image, [])
        elif image.run in slots and image.end == tokens:
            yield Save(request, image, slots[image.run])
        else:
            known.unsaved.clear()


def images_of(request: Any) -> list[tuple[int, int]]:
    """(first token, number of tokens) of each image of one of vLLM's requests; separators cut an image into parts."""
    return [part for feature in request.mm_features for part in parts_of(feature)]


def parts_of(feature: Any) -> list[tuple[int, int]]:
    """(first token, number of tokens) of each part of one image."""
    return [(begin, end + 1 - begin) for begin, end in feature.mm_position.extract_embeds_range()]
