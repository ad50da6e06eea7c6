"""What a cache was given: token ids, and which of them a mask hides.

A prompt that does not go on from its cache would be answered all the same, from the other conversation that the cache
holds; a mask cannot hide what is compressed already; and a forward that broke off leaves layers of unlike length. The
record tells all three.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import ConfigError
from .masks import full_attention_mask, present_in

_UNKNOWN = -1
"""In place of a token id: the token came another way than by a forward of known ids."""


class TokenRecord:
    """Token ids of a cache's tokens, in chunks as they came, and the mask of the last forward of several tokens."""

    def __init__(self) -> None:
        self._chunks: list[torch.Tensor] = []
        """[B, N] int64 each."""
        self._recorded = 0
        """Tokens of all chunks."""
        self._mask: torch.Tensor | None = None
        """[B, N] bool: False at tokens that the mask hid; None: none."""
        self._arriving: tuple[int, torch.Tensor | None, torch.Tensor | None] | None = None
        """Of a forward that has not ended: the length before it, ids and mask."""

    def begin(self, input_ids: torch.Tensor | None, mask: Any, past: int, new: int) -> None:
        """A forward of `new` tokens begins behind `past` ones; mask: in any form that models take."""
        known = None if input_ids is None else input_ids.to(torch.int64)
        self._arriving = (past, known, _whole(mask, past + new) if new > 1 else None)
        self._fill_up(past, len(input_ids) if input_ids is not None else None)

    def end(self) -> None:
        """The forward ended: the cache holds its tokens."""
        if self._arriving is not None:
            _, ids, mask = self._arriving
            if ids is not None:
                self._add(ids)
            if mask is not None:
                self._mask = mask
            self._arriving = None

    def require_whole(self, lengths: Sequence[int]) -> None:
        """Raises ConfigError if a forward broke off when some layers had its tokens; lengths: tokens of each layer."""
        if self._arriving is not None and any(length != self._arriving[0] for length in lengths):
            raise ConfigError(
                "the last forward over this cache broke off half-way: some layers hold its tokens, others do not. Go"
                " on with a copy that was made before, or read the conversation into a new CapsuleCache."
            )
        self._arriving = None

    def require_mask(self, mask: Any, total: int, stored: int) -> None:
        """Refuse a mask over compressed tokens that differs from the one that they were read under.

        Args:
            mask: of a forward, in any form that models take; one that does not reach back over all tokens says nothing.
            total: tokens of the cache and the forward.
            stored: tokens that are compressed.

        Raises:
            ConfigError: naming the first token that differs.
        """
        seen = full_attention_mask(mask)
        if not isinstance(seen, torch.Tensor) or seen.shape[-1] != total:
            return
        seen = present_in(seen)[..., :stored]
        if self._mask is not None:
            count = min(stored, self._mask.shape[1])
            same = seen[..., :count] == self._mask[:, None, :count].to(seen.device)
        else:
            same = seen
        if not bool(same.all()):
            row, _, token = (~same).nonzero()[0].tolist()
            raise ConfigError(
                f"the attention mask of row {row} differs at token {token} from the one under which that token was"
                " read, and it is compressed already: pass the mask of the prompt, with ones behind it."
            )

    def require_continuation(self, input_ids: torch.Tensor, mask: Any, past: int) -> None:
        """Refuse a prompt of generate that does not go on from the cache.

        Args:
            input_ids: [B, N]: the whole conversation, or, with a longer mask, the tokens that are not cached.
            mask: [B, M], or None.
            past: tokens that the cache holds.

        Raises:
            ConfigError: with the counts, or the first token that differs.
        """
        tokens = input_ids.shape[1]
        masked = mask.shape[1] if isinstance(mask, torch.Tensor) and mask.dim() == 2 else tokens
        if masked > tokens:
            if masked - tokens != past:
                raise ConfigError(
                    f"the attention mask is of {masked} tokens, of which {tokens} are given, but the cache holds"
                    f" {past}: pass the tokens behind those, with a mask over all."
                )
            return
        if tokens <= past:
            raise ConfigError(
                f"the prompt has {tokens} tokens, and the cache holds {past} already: pass the whole conversation, with"
                " at least one token behind what is cached, or use a new CapsuleCache."
            )
        ids = self._ids()
        if ids is None or ids.shape[0] != input_ids.shape[0]:
            return
        count = min(past, ids.shape[1])
        ids = ids[:, :count]
        differs = (ids != input_ids[:, :count].to(ids.device)) & (ids != _UNKNOWN)
        if self._mask is not None:
            # Padding may be any token.
            known = min(count, self._mask.shape[1])
            differs[:, :known] &= self._mask[:, :known].to(ids.device)
        if bool(differs.any()):
            row, token = differs.nonzero()[0].tolist()
            raise ConfigError(
                f"token {token} of row {row} is {int(input_ids[row, token])}, and the cache holds"
                f" {int(ids[row, token])} there: the cache is of another conversation. Pass the conversation that it"
                " holds, or use a new CapsuleCache."
            )

    def crop(self, length: int) -> None:
        """Tokens were taken back, and the cache holds `length` now."""
        if self._mask is not None:
            self._mask = self._mask[:, :length]
        ids = self._ids()
        if ids is not None:
            self._chunks = [ids[:, :length]]
            self._recorded = self._chunks[0].shape[1]

    def select(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Rows of the batch are selected, as `choose` selects numbers of the rows."""
        ids = self._ids()
        if ids is not None:
            self._chunks = [ids[choose(torch.arange(len(ids))).to(ids.device)]]
        if self._mask is not None and len(self._mask) > 1:
            self._mask = self._mask[choose(torch.arange(len(self._mask))).to(self._mask.device)]

    def _ids(self) -> torch.Tensor | None:
        if len(self._chunks) > 1:
            self._chunks = [torch.cat([chunk.to(self._chunks[-1].device) for chunk in self._chunks], dim=1)]
        return self._chunks[0] if self._chunks else None

    def _fill_up(self, past: int, rows: int | None) -> None:
        """Stand in for tokens that no forward of known ids brought."""
        if past > self._recorded and rows is not None:
            self._add(torch.full((rows, past - self._recorded), _UNKNOWN))

    def _add(self, ids: torch.Tensor) -> None:
        self._chunks.append(ids)
        self._recorded += ids.shape[1]


def _whole(mask: Any, total: int) -> torch.Tensor | None:
    """[B, total] bool of a mask over all tokens; None: nothing is hidden, or it is not known."""
    seen = full_attention_mask(mask)
    if not isinstance(seen, torch.Tensor) or seen.shape[-1] != total:
        return None
    return present_in(seen)[:, -1]
