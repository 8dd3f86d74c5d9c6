"""Loops in what a model writes, from token ids: no synchronisation, no shape that depends on data, no Python per row.

The caller keeps `window`, (B, WINDOW) int32 or int64: the last tokens of each request's output, the newest last, -1
where there is none yet, and asks every EVERY tokens. It may give `words`, (V,) bool, the tokens that are letters alone.

A loop of a period (1 to PERIOD tokens) is text that equals what was written one or two periods before, with some words
changed, come or gone. A loop without one is text of which most was said twice already: sentences in another order, a
text that grows, a paragraph that comes back. Tables, sums and proofs by cases share their words and differ in their
numbers: a token that differs each time after the same three counts against a loop.

Shapes: B requests, W window, R = B x len(TAILS) proposed periods, T newest tokens, S shifts.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

WINDOW = 2048
EVERY = 64
"""Tokens between two looks. A loop is due 2 periods + 2 EVERY after its start: MORE tokens are needed, then a look."""
PERIOD = 512
MORE, MUCH_MORE = 64, 192
"""Tokens that are counted beyond one period, and beyond two. Less, and a form's blank rows are a loop."""
DRIFT = 8
"""Tokens by which a copy may have moved."""
TAILS = (64, 128, 256, 512)
"""A period is proposed by the newest 64, 128, 256 and 512 tokens: the loop may be as young as that."""
SEED, CONTEXT, SAID = 5, 3, 12
"""Length of the n-grams that propose a period, that come before a token that differs, that count as said."""
SAID_OF = 1024
SAME, SAME_WORDS, SAME_LONG, SAID_TWICE = 0.98, 0.8, 0.79, 0.38
"""Least shares: of one period + MORE; of that where it is prose; of two periods + MUCH_MORE; said twice of SAID_OF.

Honest text reaches 0.94, 0.57, 0.73 and 0.27 in the tuning half of benchmarks/detection.py: functions of Python's own
library that are copies but for a name, and proofs by cases."""
PROSE = 0.63
"""Least share of words in prose: code, tables and formulas are nearly the same from line to line, prose is not."""
PRIME = 6364136223846793005


class Repetition(NamedTuple):
    """What a look found, each (B,): the verdict, the period in tokens (0: none), and the two shares behind it."""

    looping: Tensor
    period: Tensor
    copied: Tensor
    said: Tensor


def words_of(decode: Callable[[list[int]], str], size: int) -> Tensor:
    """Which tokens of a vocabulary are letters of any script, with or without a space, (V,) bool on the CPU."""
    return torch.tensor([decode([token]).strip().isalpha() for token in range(size)])


def _before(window: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Tokens since the n-gram ending at each position was last there, and from there to the one before; 0: none."""
    wide = window.shape[1]
    hashed, known = torch.zeros_like(window), torch.ones_like(window, dtype=torch.bool)
    for back in range(n):
        token = torch.roll(window, back, 1)
        hashed = (hashed ^ (hashed >> 29)) * PRIME + token + 1
        known &= token >= 0
    known[:, : n - 1] = False
    # The position, in the low bits, keeps equal n-grams in their order.
    key = ((hashed ^ (hashed >> 31)) * PRIME * wide + torch.arange(wide, device=window.device)).sort(1).values
    position, ngram = key & (wide - 1), key & -wide
    once, twice = torch.zeros_like(window), torch.zeros_like(window)
    once[:, 1:] = torch.where(ngram[:, 1:] == ngram[:, :-1], position.diff(dim=1), 0)
    twice[:, 1:] = torch.where(once[:, 1:] > 0, once[:, :-1], 0)
    lags = [torch.zeros_like(window).scatter_(1, position, lag) * known for lag in (once, twice)]
    return lags[0], lags[1]


def _proposed(lag: Tensor) -> Tensor:
    """The commonest distance to an earlier copy, 1 to PERIOD, (B,); distances within half of DRIFT count together."""
    counts = torch.zeros(lag.shape[0], WINDOW, device=lag.device).scatter_add_(1, lag, (lag > 0).float())
    counts = counts[:, : PERIOD + DRIFT // 2 + 1]
    near = torch.nn.functional.avg_pool1d(counts[:, None], DRIFT + 1, 1, DRIFT // 2)[:, 0] + counts / WINDOW
    return near[:, 1 : PERIOD + 1].argmax(1) + 1


def _copied(window: Tensor, tail: Tensor, distance: Tensor, drift: Tensor) -> Tensor:
    """Whether each of the newest tokens (R, T) is one of three in a row that equal those `distance` before."""
    newest = tail.shape[1]
    index = torch.arange(-newest - DRIFT, DRIFT, device=window.device) + window.shape[1] - distance[:, None]
    source = window.gather(1, index.clamp(0, window.shape[1] - 1)).unfold(1, newest, 1)  # (R, S, T)
    shift = torch.arange(-DRIFT, DRIFT + 1, device=window.device)
    allowed = (shift.abs() <= drift[:, None]) & (shift < distance[:, None])
    equal = (source == tail[:, None]) & (tail >= 0)[:, None] & allowed[:, :, None]
    three = (equal[:, :, 2:] & equal[:, :, 1:-1] & equal[:, :, :-2]).any(1)
    copied = torch.zeros_like(tail, dtype=torch.bool)
    for end in range(3):
        copied[:, end : newest - 2 + end] |= three
    return copied


def _differs(window: Tensor) -> Tensor:
    """Whether each token and the two that came after the same CONTEXT before are three different ones, (B, W)."""
    once, twice = (lag[:, :-1] for lag in _before(window, CONTEXT))
    position = torch.arange(1, window.shape[1], device=window.device)
    now, last, older = window[:, 1:], window.gather(1, position - once), window.gather(1, position - once - twice)
    return torch.nn.functional.pad((twice > 0) & (now != last) & (now != older) & (last != older), (1, 0))


def repetition(window: Tensor, words: Tensor | None = None) -> Repetition:
    """Looks for a loop at the end of each row of the window (B, WINDOW)."""
    window = window.long()
    rows, newest = window.shape[0], 2 * PERIOD + MUCH_MORE
    lag, _ = _before(window, SEED)
    period = torch.stack([_proposed(lag[:, -tail:]) for tail in TAILS], 1).view(-1)
    wide = window.repeat_interleave(len(TAILS), 0)
    tail, drift = wide[:, -newest:], 2 + period // 16
    copied = _copied(wide, tail, period, drift) | _copied(wide, tail, 2 * period, drift)
    differs = _differs(window)[:, -newest:].repeat_interleave(len(TAILS), 0) & ~copied
    # A number that is new each time weighs as much as two copied tokens.
    counted = (copied.float() - 2 * differs.float()).flip(1).cumsum(1)
    one, two = period + MORE, 2 * period + MUCH_MORE
    share = counted.gather(1, one[:, None] - 1)[:, 0] / one
    long = counted.gather(1, two[:, None] - 1)[:, 0] / two
    least = torch.full_like(share, SAME)
    if words is not None:
        letters = words[tail.clamp(0, words.shape[0] - 1)].float().flip(1).cumsum(1)
        least = torch.where(letters.gather(1, one[:, None] - 1)[:, 0] / one >= PROSE, SAME_WORDS, SAME)
    found = ((share >= least) | (long >= SAME_LONG)).view(rows, -1)
    best = (share.view(rows, -1) + found).max(1)
    said = (_before(window, SAID)[1][:, -SAID_OF:] > 0).float().mean(1)
    periodic = found.any(1)
    at = period.view(rows, -1).gather(1, best.indices[:, None])[:, 0]
    share = share.view(rows, -1).gather(1, best.indices[:, None])[:, 0].clamp(0, 1)
    return Repetition(periodic | (said >= SAID_TWICE), torch.where(periodic, at, 0), share, said)


def looping(window: Tensor, words: Tensor | None = None) -> Tensor:
    """The verdict alone, (B,) bool."""
    return repetition(window, words).looping
