"""What each request has written and what it may write next: a state machine on tensors, one row a slot.

Nothing here waits for the device, has a shape that depends on data, or loops over requests; all state is a function of
the request's tokens and of the step's number, so that the ranks of a tensor-parallel group agree.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qvq_serve.governor.detect import EVERY, WINDOW, looping

NEVER = 2**31 - 1
UNLIMITED = NEVER - 1
"""Of `ends_at`: the request has not concluded; it has by itself, and may write as much as it likes."""
FORCE = 1e4
"""The logit of a token that must come: no other can be sampled at any temperature that vLLM admits (0.01 to 2)."""
PREFIX = 3
"""Tokens of the conclusion that a history must end with to be taken for one that was being written."""
COUNTED = ("found", "concluded", "ended", "budget")
"""Loops found; requests made to conclude; ended by a second loop or by the limit; of the concluded, by their budget."""


@dataclass(frozen=True)
class Conclusion:
    """How a request is made to conclude."""

    tokens: tuple[int, ...]
    """Of the marker, as no tokenizer would write it, so that it can be told from the model's own."""
    end: int
    """The token that ends the turn."""
    limit: int
    """Tokens that may follow it."""
    natural: tuple[tuple[int, ...], ...] = ()
    """The markers by which the model concludes by itself, each as the tokenizer writes it."""


class Governor:
    """The state of `slots` requests, on a device."""

    def __init__(
        self, slots: int, device: torch.device, conclusion: Conclusion, acts: bool, words: Tensor | None = None
    ) -> None:
        """`words`: which tokens of the vocabulary are letters (detect.words_of), (V,) bool."""

        def each(value: int, kind: torch.dtype = torch.int32) -> Tensor:
            return torch.full((slots,), value, dtype=kind, device=device)

        self.conclusion, self.acts, self.words, self.step = conclusion, acts, words, 0
        self.window = torch.full((slots, WINDOW), -1, dtype=torch.int32, device=device)
        """The last tokens of each request's output, a ring: output token i lies at i % WINDOW."""
        self.seen, self.forced, self.ends_at, self.budget = each(0), each(-1), each(NEVER), each(NEVER)
        """Output tokens so far; the conclusion's token that is due, or -1; the count at which the turn must end."""
        self.governed, self.found = each(0, torch.bool), each(0, torch.bool)
        self.counts = torch.zeros(len(COUNTED), dtype=torch.int64, device=device)
        self.marker = torch.tensor(conclusion.tokens, dtype=torch.int64, device=device)
        self.order = torch.arange(WINDOW, device=device)
        longest = max(map(len, conclusion.natural), default=0)
        padded = [[-1] * (longest - len(tokens)) + list(tokens) for tokens in conclusion.natural]
        self.natural = torch.tensor(padded, dtype=torch.int32, device=device).reshape(len(padded), longest)
        """(markers, tokens), -1 in front where one is shorter."""
        self.shares = [torch.arange(first, slots, EVERY, device=device) for first in range(min(EVERY, slots))]

    def begin(self, slot: int, history: list[int], governed: bool, budget: int | None) -> None:
        """A request comes into a slot, with what it wrote before it was preempted."""
        seen, marker = len(history), list(self.conclusion.tokens)
        self.window[slot] = -1
        forced, natural = first_end(history, [self.conclusion.tokens]), first_end(history, self.conclusion.natural)
        after = min(forced or NEVER, natural or NEVER) if forced or natural else 0
        tail = history[after:][-WINDOW:]
        if tail:
            places = self.order.new_tensor([(seen - len(tail) + at) % WINDOW for at in range(len(tail))])
            self.window[slot, places] = self.window.new_tensor(tail)
        written = next((k for k in range(len(marker) - 1, PREFIX - 1, -1) if history[-k:] == marker[:k]), -1)
        self.seen[slot], self.forced[slot], self.found[slot] = seen, written, False
        by_itself = after < (forced or NEVER)
        self.ends_at[slot] = UNLIMITED if after and by_itself else after + self.conclusion.limit if after else NEVER
        self.governed[slot], self.budget[slot] = governed, NEVER if budget is None else budget

    def apply(self, logits: Tensor, slots: Tensor, last: Tensor, seen: Tensor) -> None:
        """Looks at the newest token of each row, and forces the next one where that is due.

        `logits` (R, V) is changed in place; `slots` (R,) int64; `last` (R,) the newest token; `seen` (R,) output tokens
        so far, 0 or less for a row that has none yet.
        """
        live = self.governed[slots] & (seen > 0)
        place = (seen.clamp(min=1) - 1) % WINDOW
        self.window[slots, place] = torch.where(live, last.to(torch.int32), self.window[slots, place])
        self.seen[slots] = torch.where(live, seen.to(torch.int32), self.seen[slots])
        self.look()
        self.act(logits, slots, live)
        self.step += 1

    def look(self) -> None:
        """Looks for loops in this step's share of the slots."""
        if self.step % EVERY >= len(self.shares):
            return
        share = self.shares[self.step % EVERY]
        oldest_first = (self.seen[share, None] + self.order) % WINDOW
        found = looping(self.window[share].gather(1, oldest_first), self.words) & self.governed[share]
        self.counts[0] += (found & ~self.found[share]).sum()
        self.found[share] |= found

    def concludes(self, slots: Tensor, seen: Tensor) -> Tensor:
        """Whether each row's newest tokens are a marker of the model's own, (R,)."""
        if not len(self.natural):
            return torch.zeros_like(seen, dtype=torch.bool)
        back = torch.arange(-self.natural.shape[1], 0, device=seen.device)
        newest = self.window[slots[:, None], (seen[:, None] + back) % WINDOW]
        return ((newest[:, None] == self.natural) | (self.natural < 0)).all(2).any(1)

    def move(self, source: int, target: int) -> None:
        """Two slots change places."""
        for state in (self.window, self.seen, self.forced, self.ends_at, self.budget, self.governed, self.found):
            state[[source, target]] = state[[target, source]]

    def act(self, logits: Tensor, slots: Tensor, live: Tensor) -> None:
        """Begins, goes on with or ends a conclusion."""
        if not self.acts:
            return
        seen, found, forced, ends_at = self.seen[slots], self.found[slots], self.forced[slots], self.ends_at[slots]
        natural = live & (forced < 0) & (ends_at == NEVER) & self.concludes(slots, seen)
        ends_at = torch.where(natural, UNLIMITED, ends_at)
        fresh = live & (forced < 0) & (ends_at == NEVER)
        over_budget = fresh & (seen >= self.budget[slots])
        start = fresh & (found | over_budget)
        end = live & (forced < 0) & (ends_at != NEVER) & ~natural & (found | (seen >= ends_at))
        forced = torch.where(start, 0, forced)
        due = live & (forced >= 0)
        token = torch.where(end, self.conclusion.end, self.marker[forced.clamp(min=0)])
        current = logits.gather(1, token[:, None])
        logits.scatter_(1, token[:, None], torch.where((due | end)[:, None], FORCE, current))
        written = due & (forced + 1 == len(self.marker))
        self.forced[slots] = torch.where(written, -1, torch.where(due, forced + 1, forced)).to(torch.int32)
        # A second loop is one in what follows the conclusion: what was before is forgotten.
        concluded = written | natural
        self.window[slots] = self.window[slots].masked_fill(concluded[:, None], -1)
        self.ends_at[slots] = torch.where(written, seen + 1 + self.conclusion.limit, ends_at).to(torch.int32)
        self.found[slots] = found & ~(start | concluded)
        self.counts[1:] += torch.stack([start.sum(), end.sum(), over_budget.sum()])


def first_end(history: list[int], markers: Iterable[tuple[int, ...]]) -> int:
    """Tokens of a history up to and with the first whole marker; 0 where there is none."""
    ends = (
        at + len(marker)
        for marker in markers
        for at in range(len(history) - len(marker) + 1)
        if tuple(history[at : at + len(marker)]) == marker
    )
    return min(ends, default=0)
