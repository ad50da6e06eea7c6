"""The softmax of a block of tiles, beside what has been added up of the tiles before: scores become weights where they are."""

import numpy as np

from .jit import U, lent
from .wide import each, exp, greatest, least, load, peak, plus, scaled, store, total

_NONE = np.float32(-np.inf)


@lent
def soften(scores, rows, tiles, room, cap, top, mass, factors):
    """scores [P, R, 2, N'] of `tiles` tiles to weights; cap [tiles, N'] is infinite, or -inf where there is no token.

    Returns whether a row's greatest score rose: what has been added up of it before counts for less then, by its factor.
    """
    risen = False
    for row in range(rows):
        high = each(_NONE)
        for tile in range(tiles):
            at, ceiling = ((tile // U(2) * rows + row) * U(2) + tile % U(2)) * room, tile * room
            n = U(0)
            while n < room:
                high = greatest(least(load(scores, at + n), load(cap, ceiling + n)), high)
                n += U(16)
        factors[row] = np.float32(1)
        new = peak(high)
        if new > top[row]:
            # Nothing has been added to a row whose greatest score is still -inf.
            if top[row] > _NONE:
                factors[row] = total(exp(each(top[row] - new))) * np.float32(1 / 16)
                risen = True
            top[row] = new
        low, mine, one = each(-top[row] if top[row] > _NONE else np.float32(0)), each(np.float32(0)), each(np.float32(1))
        for tile in range(tiles):
            at, ceiling = ((tile // U(2) * rows + row) * U(2) + tile % U(2)) * room, tile * room
            n = U(0)
            while n < room:
                weight = exp(plus(low, least(load(scores, at + n), load(cap, ceiling + n)), one))
                store(scores, at + n, weight)
                mine = plus(mine, weight, one)
                n += U(16)
        mass[row] = mass[row] * factors[row] + total(mine)
    return risen


@lent
def fall(sums, factor, first, many, apart):
    """`many` vectors from `first` on, `apart` from each other, times a factor."""
    for i in range(many):
        at = first + i * apart
        store(sums, at, scaled(load(sums, at), each(factor)))


@lent
def ceilings(cap, tile, room, many, entries, entry, token, there):
    """cap[tile] for `many` tokens of an entry from `token` on: -inf where there is none that anyone sees.

    there[tile] becomes how many there are: the caller need not ask again for as many without a mask.
    """
    there[tile] = many
    at, first = tile * room, entry * entries.tokens + token
    for n in range(room):
        cap[at + n] = np.float32(np.inf) if n < many else _NONE
    for n in range(many):
        if entries.masked and not entries.mask[first + n]:
            cap[at + n] = _NONE
        if entries.hidden:
            seen = False
            for q in range(entries.queries):
                seen = seen or entries.visible[(entry * entries.queries + q) * entries.tokens + token + n]
            if not seen:
                cap[at + n] = _NONE


@lent
def corrected(scores, s0, apart, rows, entries, entry, head, token, many):
    """Scores of an entry's tokens, rows `apart`, with their bias, and -inf where a query does not see a token."""
    if len(entries.bias) > 1:
        of_entry, of_head, of_token = entries.bias_steps
        for n in range(many):
            more = entries.bias[entry * of_entry + head * of_head + (token + n) * of_token]
            for row in range(rows):
                scores[s0 + row * apart + n] += more
    if entries.hidden:
        for row in range(rows):
            seen = (entry * entries.queries + row % entries.queries) * entries.tokens + token
            for n in range(many):
                if not entries.visible[seen + n]:
                    scores[s0 + row * apart + n] = _NONE
