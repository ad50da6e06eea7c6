"""Attention drift: overlap of the visual tokens that the prompt attends to with those that the answer attends to."""

from collections.abc import Sequence

import torch

TOP = 0.1
"""Share of the visual tokens in the top sets that are compared."""
KEPT = (0.1, 0.25, 0.4)
"""Shares of the visual tokens that a pruning method may keep."""
REFERENCES = ("last_prompt_token", "post_vision")
"""Rankings of visual tokens at prefill: by the attention of the prompt's last token, or of all prompt tokens after the
last image."""
MAX_STEPS = 256
"""Largest number of decode steps in the study."""
_CHUNK = 64
"""Queries per block of scores."""


def attention_on(
    query_AQD: torch.Tensor, keys_HND: torch.Tensor, positions: Sequence[int], seen_N: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of one row's queries over its tokens, averaged over query heads, [Q, N]. In fp32, without soft-capping
    or attention sinks.

    Args:
        query_AQD: queries of A = H G heads.
        keys_HND: keys of the row.
        places: [Q] positions of the queries; a query sees tokens up to its own position.
        seen_N: bool, False at padding.
        scale: scale of the scores.
    """
    heads, tokens, _ = keys_HND.shape
    query = query_AQD.float().unflatten(0, (heads, -1))
    keys = keys_HND.float()[:, None].transpose(-1, -2)
    at = torch.tensor(list(positions), device=keys.device)
    values = []
    for start in range(0, len(at), _CHUNK):
        run = slice(start, start + _CHUNK)
        scores = (query[:, :, run] * scale) @ keys
        visible = seen_N & (torch.arange(tokens, device=keys.device) <= at[run, None])
        values.append(scores.masked_fill(~visible, -torch.inf).softmax(-1).mean((0, 1)))
    return torch.cat(values)


def count_of(share: float, tokens: int) -> int:
    """Number of tokens in a share of `tokens`, rounded as in pruning policies; at least 1."""
    return max(1, round(share * tokens))


class Drift:
    """Drift statistics of one layer, summed over questions, by step. Step 0 is the prompt's last token, which predicts
    the answer's first token."""

    def __init__(self) -> None:
        self.questions = torch.zeros(MAX_STEPS + 1, dtype=torch.float64)
        self.sums: dict[tuple[str, str, float], torch.Tensor] = {}

    def add(self, steps_SV: torch.Tensor, post_vision_V: torch.Tensor) -> None:
        """Add one question.

        Args:
            steps_SV: attention on the V visual tokens at each step (attention on all tokens sums to 1).
            post_vision_V: the same, summed over the prompt tokens after the last image.
        """
        steps = steps_SV.detach().double().cpu()[: MAX_STEPS + 1]
        tokens = steps.shape[1]
        mass = steps.sum(1)
        share = steps / mass.clamp_min(torch.finfo(steps.dtype).tiny)[:, None]
        step_ranks = _ranks(steps)
        references = dict(
            zip(REFERENCES, (step_ranks[0], _ranks(post_vision_V.detach().double().cpu()[None])[0]), strict=True)
        )
        self._add("visual_mass", "", 0.0, mass)
        top = count_of(TOP, tokens)
        for name, ranks in references.items():
            common = ((step_ranks < top) & (ranks < top)).sum(1)
            self._add("overlap", name, TOP, common / (2 * top - common))
        for kept in KEPT:
            count = count_of(kept, tokens)
            for name, ranks in references.items():
                self._add("held", name, kept, share[:, ranks < count].sum(1))
            self._add("held", "best", kept, (share * (step_ranks < count)).sum(1))
        self.questions[: len(steps)] += 1

    @property
    def steps(self) -> int:
        """Number of steps of the longest answer, including step 0."""
        return int((self.questions > 0).sum())

    def curve(self, what: str, by: str = "", share: float = 0.0) -> torch.Tensor:
        """Mean of one statistic by step, [steps], over the questions whose answers have that step."""
        return self.sums[what, by, share][: self.steps] / self.questions[: self.steps]

    def _add(self, what: str, by: str, share: float, values: torch.Tensor) -> None:
        total = self.sums.setdefault((what, by, share), torch.zeros_like(self.questions))
        total[: len(values)] += values


def _ranks(scores: torch.Tensor) -> torch.Tensor:
    """Rank of each entry within its row, 0 for the largest; ties by position."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(1, order, torch.arange(scores.shape[1]).expand_as(order))
