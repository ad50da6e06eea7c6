"""Whether the visual tokens that the prompt attends to are those that the answer reads."""

from collections.abc import Sequence

import torch

TOP = 0.1
"""Share of the visual tokens whose overlap is followed."""
KEPT = (0.1, 0.25, 0.4)
"""Shares of the visual tokens that a pruning method may keep."""
REFERENCES = ("last_prompt_token", "post_vision")
"""By whose attention prefill ranks visual tokens: that of the prompt's last token, or the sum over the prompt behind
the last image."""
MAX_STEPS = 256
"""Decode steps that are followed at most."""
_CHUNK = 64
"""Queries whose scores are held at once."""


def attention_on(
    query_AQD: torch.Tensor, keys_HND: torch.Tensor, places: Sequence[int], seen_N: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of a row's queries over its tokens, mean over the query heads: [Q, N]. In fp32; no soft-capping, no
    sinks.

    Args:
        query_AQD: A = H G query heads.
        places: [Q] position of each; it sees tokens up to there.
        seen_N: bool, False at padding.
    """
    heads, tokens, _ = keys_HND.shape
    query = query_AQD.float().unflatten(0, (heads, -1))
    keys = keys_HND.float()[:, None].transpose(-1, -2)
    at = torch.tensor(list(places), device=keys.device)
    found = []
    for start in range(0, len(at), _CHUNK):
        run = slice(start, start + _CHUNK)
        scores = (query[:, :, run] * scale) @ keys
        visible = seen_N & (torch.arange(tokens, device=keys.device) <= at[run, None])
        found.append(scores.masked_fill(~visible, -torch.inf).softmax(-1).mean((0, 1)))
    return torch.cat(found)


def count_of(share: float, tokens: int) -> int:
    """As pruning policies count."""
    return max(1, round(share * tokens))


class Drift:
    """Sums over questions for one layer, by step. Step 0 is the prompt's last token, which writes the answer's first
    token."""

    def __init__(self) -> None:
        self.questions = torch.zeros(MAX_STEPS + 1, dtype=torch.float64)
        self.sums: dict[tuple[str, str, float], torch.Tensor] = {}

    def add(self, steps_SV: torch.Tensor, post_vision_V: torch.Tensor) -> None:
        """Add one question.

        Args:
            steps_SV: attention on the V visual tokens at each step, of what a query gives to all tokens.
            post_vision_V: the same, summed over the prompt's tokens behind the last image.
        """
        steps = steps_SV.detach().double().cpu()[: MAX_STEPS + 1]
        tokens = steps.shape[1]
        mass = steps.sum(1)
        share = steps / mass.clamp_min(torch.finfo(steps.dtype).tiny)[:, None]
        own = _ranks(steps)
        references = dict(
            zip(REFERENCES, (own[0], _ranks(post_vision_V.detach().double().cpu()[None])[0]), strict=True)
        )
        self._add("visual_mass", "", 0.0, mass)
        top = count_of(TOP, tokens)
        for name, ranks in references.items():
            common = ((own < top) & (ranks < top)).sum(1)
            self._add("overlap", name, TOP, common / (2 * top - common))
        for kept in KEPT:
            count = count_of(kept, tokens)
            for name, ranks in references.items():
                self._add("held", name, kept, share[:, ranks < count].sum(1))
            self._add("held", "best", kept, (share * (own < count)).sum(1))
        self.questions[: len(steps)] += 1

    @property
    def steps(self) -> int:
        """Steps that any answer had, step 0 included."""
        return int((self.questions > 0).sum())

    def curve(self, what: str, by: str = "", share: float = 0.0) -> torch.Tensor:
        """[steps]: mean over the questions whose answers are so long."""
        return self.sums[what, by, share][: self.steps] / self.questions[: self.steps]

    def _add(self, what: str, by: str, share: float, found: torch.Tensor) -> None:
        total = self.sums.setdefault((what, by, share), torch.zeros_like(self.questions))
        total[: len(found)] += found


def _ranks(scores: torch.Tensor) -> torch.Tensor:
    """Rank of each entry in its row, 0 the greatest; of equal ones the first comes first."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(1, order, torch.arange(scores.shape[1]).expand_as(order))
