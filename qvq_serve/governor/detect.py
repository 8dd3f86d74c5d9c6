"""Loops in what a model writes, from token ids: no synchronisation, no shape that depends on data, no Python per row.

The caller keeps `window`, (B, WINDOW) int32 or int64: the last tokens of each request's output, the newest last, -1
where there is none yet, and asks every EVERY tokens. It gives `words`, (V,) int8: WORD for tokens that are letters
alone, NUMBER for digits alone, else 0.

A loop of a period (1 to PERIOD tokens) is text that equals what was written one or two periods before, with some words
changed, come or gone. What may be new in it depends on the text: tables, code and formulas are nearly the same from
line to line and say something new by a word; prose does so by many words, or by numbers. Where all words stand as
before and only numbers are new, it is a loop that counts its rounds. A loop without a period is text of which most was
said twice already: sentences in another order, a text that grows, a paragraph that comes back.

Shapes: B requests, W window, R = B x len(TAILS) proposed periods, T newest tokens, S shifts.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

WINDOW = 2048
EVERY = 64
"""Tokens between two looks."""
PERIOD = 512
MORE = 64
"""Tokens that are counted beyond one period; less, and a form's blank rows are a loop. A find is due 2 periods + K
tokens after a loop's start, K = EVERY + MORE: so much must be there, then a look comes."""
DRIFT = 8
"""Tokens by which a copy may have moved."""
TAILS = (64, 128, 256, 512)
"""A period is proposed by the newest 64, 128, 256 and 512 tokens: the loop may be as young as that."""
SEED, SAID = 5, 12
"""Length of the n-grams that propose a period, and that count as said."""
SAID_OF = 1024
NUMBER, WORD = 1, 2
"""What a token is, of `words`."""
SAME, NEW_WORD = 0.945, 4
"""Least share of copied tokens in one period + MORE; a new word counts so much more.

Honest text that was tuned on reaches 0.941: six calls that differ in their numbers, in Python's own library."""
PROSE_WORDS, PROSE_TEXT, SAME_PROSE = 0.45, 0.68, 0.79
"""Prose has so many words, and so many words and numbers; its least share of copies, where a new number counts twice.

Proofs by cases have 0.44 words; a docstring copied for the next function reaches a share of 0.789."""
COUNTING_WORDS, SAME_COUNTING, SAME_BUT_NUMBERS = 0.18, 0.9, 0.99
"""A loop that counts: least shares of words, of copies, and of copies and new numbers. One other token may be new.
Proofs by cases reach 0.896 of copies."""
SAID_TWICE = 0.38
"""Least share of SAID_OF tokens said twice already; honest text reaches 0.28."""
PRIME = 6364136223846793005


class Repetition(NamedTuple):
    """What a look found, each (B,): the verdict, and the period in tokens (0: none)."""

    looping: Tensor
    period: Tensor


def word(text: str) -> int:
    """What a token is, with or without a space around it: a WORD of any script's letters, a NUMBER, or neither: 0."""
    text = text.strip()
    return WORD if text.isalpha() else NUMBER if text.isdigit() else 0


def words_of(decode: Callable[[list[int]], str], size: int) -> Tensor:
    """What each token of a vocabulary is, (V,) int8 on the CPU."""
    return torch.tensor([word(decode([token])) for token in range(size)], dtype=torch.int8)


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
    """The commonest distance to an earlier copy, 1 to PERIOD, (B,); others within half of DRIFT count for it too."""
    counts = torch.zeros(lag.shape[0], WINDOW, device=lag.device).scatter_add_(1, lag, (lag > 0).float())
    counts = counts[:, : PERIOD + DRIFT // 2 + 1]
    near = torch.nn.functional.avg_pool1d(counts[:, None], DRIFT + 1, 1, DRIFT // 2)[:, 0] + counts / 4
    return near[:, 1 : PERIOD + 1].argmax(1) + 1


def _copied(window: Tensor, tail: Tensor, distance: Tensor, drift: Tensor) -> Tensor:
    """Whether each of the newest tokens (R, T) is of three in a row that equal those `distance` (to PERIOD) before."""
    newest = tail.shape[1]
    index = torch.arange(-newest - DRIFT, DRIFT, device=window.device) + window.shape[1] - distance[:, None]
    source = window.gather(1, index.clamp(0, window.shape[1] - 1)).unfold(1, newest, 1)  # (R, S, T)
    shift = torch.arange(-DRIFT, DRIFT + 1, device=window.device)
    allowed = (shift.abs() <= drift[:, None]) & (shift < distance[:, None]) & (distance <= PERIOD)[:, None]
    equal = (source == tail[:, None]) & (tail >= 0)[:, None] & allowed[:, :, None]
    three = (equal[:, :, 2:] & equal[:, :, 1:-1] & equal[:, :, :-2]).any(1)
    copied = torch.zeros_like(tail, dtype=torch.bool)
    for end in range(3):
        copied[:, end : newest - 2 + end] |= three
    return copied


def repetition(window: Tensor, words: Tensor) -> Repetition:
    """Looks for a loop at the end of each row of the window (B, WINDOW)."""
    window = window.long()
    rows, newest = window.shape[0], PERIOD + MORE
    lag, _ = _before(window, SEED)
    period = torch.stack([_proposed(lag[:, -tail:]) for tail in TAILS], 1).view(-1)
    wide = window.repeat_interleave(len(TAILS), 0)
    tail, drift, size = wide[:, -newest:], 1 + period // 16, period + MORE
    copied = _copied(wide, tail, period, drift) | _copied(wide, tail, 2 * period, drift)
    kind = words[tail.clamp(0, words.shape[0] - 1)]
    counted = torch.stack([copied, ~copied & (kind == WORD), ~copied & (kind == NUMBER), kind == WORD, kind > 0])
    counted &= torch.arange(newest, device=window.device) >= newest - size[:, None]
    same, new_words, new_numbers, letters, text = counted.sum(2) / size
    found = same - NEW_WORD * new_words >= SAME
    prose = (letters >= PROSE_WORDS) & (text >= PROSE_TEXT)
    found |= prose & (same - new_numbers >= SAME_PROSE)
    found |= (letters >= COUNTING_WORDS) & (same >= SAME_COUNTING) & (same + new_numbers >= SAME_BUT_NUMBERS)
    found, same = found.view(rows, -1), same.view(rows, -1)
    best = (same + found).argmax(1, keepdim=True)
    period = torch.where(found, period.view(rows, -1), 0).gather(1, best)[:, 0]
    said = (_before(window, SAID)[1][:, -SAID_OF:] > 0).float().mean(1)
    return Repetition((period > 0) | (said >= SAID_TWICE), period)


def looping(window: Tensor, words: Tensor) -> Tensor:
    """The verdict alone, (B,) bool."""
    return repetition(window, words).looping
