"""What each request has written and what it may write next: a state machine on tensors, one row a slot.

Nothing here waits for the device, has a shape that depends on data, or loops over requests; all state is a function of
the request's tokens and of the step's number, so that the ranks of a tensor-parallel group agree, and a step that is
run again (a prefill in chunks, after a preemption) does nothing twice.

Shapes: S slots, R rows of a batch, V vocabulary, W window.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qvq_serve.governor.detect import EVERY, WINDOW, looping
from qvq_serve.governor.policy import Orders
from qvq_serve.governor.tokens import Vocabulary

NEVER = 2**30
"""A count of tokens that no request reaches; twice it still fits int32."""
FORCE = 1e4
"""The logit of a token that must come: no other can be sampled at any temperature that vLLM admits (0.01 to 2)."""
PREFIX = 3
"""Tokens of the conclusion that a history must end with to be taken for one that was being written."""
LOOKS = 4
"""Looks among EVERY steps, each at every LOOKS-th slot: kernels cost by their number more than by their rows."""
SAMPLED = 8
"""Of so many rows one has its entropy taken in a step."""
ROWS = 32
"""Rows that are masked at once: (ROWS, V) is the largest tensor made here."""
COUNTED = ("found", "loop", "budget", "sure", "second_loop", "limit", "look")
"""Loops found; turns made to conclude by a loop, a budget, being sure; turns ended by a second loop, by the limit of
tokens after a conclusion; looks back. Observing, those that would have been."""


@dataclass(frozen=True)
class Text:
    """The tokens that the governor writes, and those by which it knows what the model wrote."""

    conclusion: tuple[int, ...]
    """The marker, as no tokenizer would write it, so that it can be told from the model's own."""
    end: int
    """The token that ends the turn."""
    lead: tuple[int, ...] = ()
    """Line ends before the marker, left out where the model has just written one."""
    natural: tuple[tuple[int, ...], ...] = ()
    """The markers by which the model concludes by itself, each as the tokenizer writes it."""
    phrases: tuple[tuple[int, ...], ...] = field(default=((), ()))
    """A look-back, in English and in Chinese."""


def padded(rows: Sequence[Sequence[int]], front: bool) -> Tensor:
    """Rows of one length, filled up with -1 in front or behind."""
    longest = max(map(len, rows), default=0)
    fill = [[-1] * (longest - len(row)) for row in rows]
    both = [[*more, *row] if front else [*row, *more] for row, more in zip(rows, fill, strict=True)]
    return torch.tensor(both, dtype=torch.int64).reshape(len(rows), longest)


class Governor:
    """The state of `slots` requests, on a device."""

    def __init__(self, slots: int, device: torch.device, text: Text, vocabulary: Vocabulary, acts: bool) -> None:
        def each(value: int, kind: torch.dtype = torch.int32) -> Tensor:
            return torch.full((slots,), value, dtype=kind, device=device)

        self.text, self.acts, self.step = text, acts, 0
        self.orders = torch.zeros(slots, len(Orders._fields), device=device)
        self.window = torch.full((slots, WINDOW), -1, dtype=torch.int32, device=device)
        """The last tokens of each request's output, a ring: output token i lies at i % WINDOW."""
        self.seen, self.begun, self.own, self.looked = each(0), each(NEVER), each(NEVER), each(NEVER)
        """Counts of output tokens: so far; when a conclusion was begun; when the model's own stood; when the last
        look-back was begun."""
        self.found, self.open, self.looks, self.mentioned = each(0, torch.bool), each(0), each(0), each(0)
        """A loop was found; bytes that the newest character lacks; look-backs so far; where the image was mentioned."""
        self.entropy = each(0, torch.float32)
        """Nats, averaged over the last tokens."""
        self.counts = torch.zeros(len(COUNTED), dtype=torch.int64, device=device)
        self.told = torch.zeros(len(COUNTED), dtype=torch.int64, pin_memory=device.type == "cuda")
        """The counts on the host, some steps old; reading them waits for nothing."""
        self.written = torch.tensor([*text.lead, *text.conclusion], device=device)
        self.natural = padded(text.natural, front=True).to(device)
        self.phrases = padded(text.phrases, front=False).to(device)
        self.firsts = torch.tensor(sorted({marker[0] for marker in text.natural}), dtype=torch.int64, device=device)
        self.vocabulary = Vocabulary(*(table.to(device) for table in vars(vocabulary).values()))
        self.order = torch.arange(WINDOW, device=device)
        self.shares = [torch.arange(first, slots, LOOKS, device=device) for first in range(min(LOOKS, slots))]

    def begin(self, slots: list[int], orders: list[Orders], histories: list[list[int]]) -> None:
        """Requests come into slots, each with what it wrote before it was preempted."""
        device = self.orders.device
        pinned = torch.tensor(orders, dtype=torch.float32, pin_memory=device.type == "cuda")
        places = torch.tensor(slots, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        self.orders[places] = pinned.to(device, non_blocking=True)
        for state in (self.begun, self.own, self.looked):
            state.index_fill_(0, places, NEVER)
        for state in (self.seen, self.found, self.open, self.looks, self.mentioned, self.entropy):
            state.index_fill_(0, places, 0)
        for slot, history in zip(slots, histories, strict=True):
            if history:
                self.remember(slot, history)

    def remember(self, slot: int, history: list[int]) -> None:
        """Bring a slot to where a request was before it was preempted."""
        text, seen, lead = self.text, len(history), len(self.text.lead)
        tail = history[-WINDOW:]
        places = self.order.new_tensor([(seen - len(tail) + at) % WINDOW for at in range(len(tail))])
        self.window[slot, places] = self.window.new_tensor(tail)
        self.seen[slot] = seen
        own, forced = first_end(history, text.natural), first_end(history, [text.conclusion])
        whole = [*text.lead, *text.conclusion]
        last, bare = (next((k for k in range(len(marker) - 1, PREFIX - 1, -1) if history[-k:] == marker[:k]), 0)
                      for marker in (whole, whole[lead:]))  # fmt: skip
        if forced and not 0 < own <= forced - len(text.conclusion):
            self.begun[slot] = forced - len(whole)
        elif last or bare:
            self.begun[slot] = seen - (last or bare + lead)
        elif own:
            self.own[slot] = own
        ends = [end for phrase in text.phrases if phrase for end in all_ends(history, phrase)]
        self.looks[slot], self.mentioned[slot] = len(ends), max(ends, default=0)

    def move(self, source: int, target: int) -> None:
        """Two slots change places."""
        for state in (self.orders, self.window, self.seen, self.begun, self.own, self.looked, self.found, self.open,
                      self.looks, self.mentioned, self.entropy):  # fmt: skip
            state[[source, target]] = state[[target, source]]

    def apply(self, logits: Tensor, slots: Tensor, last: Tensor, seen: Tensor, wanted: Orders) -> None:
        """Look at the newest token of each row, and steer the next one where that is due.

        `logits` (R, V) is changed in place; `slots` (R,) int64; `last` (R,) the newest token; `seen` (R,) output tokens
        so far, 0 or less for a row that has none yet; `wanted` the largest of the rows' orders, known on the host: what
        nobody wants is not run.
        """
        orders = Orders(*self.orders[slots].unbind(1))
        last, seen = last.long(), seen.to(torch.int32)
        live = (orders.governed > 0) & (seen > 0)
        new = live & (seen > self.seen[slots])
        self.read(slots, last, seen, new)
        if self.step % (EVERY // LOOKS) == 0:
            self.look()
        reasoning = live & (self.begun[slots] == NEVER) & (self.own[slots] == NEVER)
        if self.natural.shape[1]:
            own = reasoning & self.concludes(slots, seen)
            self.own[slots] = torch.where(own, seen, self.own[slots])
            self.found[slots] &= ~own
            reasoning = reasoning & ~own
        if wanted.looks and self.phrases.shape[1]:
            self.measure(logits, slots, reasoning)
        reasoning = reasoning & ~self.conclude(logits, slots, last, seen, reasoning, orders, wanted)
        if self.acts:
            self.bias(logits, slots, seen, live, reasoning, orders, wanted)
        self.write(logits, slots, last, seen, live, reasoning, new, orders, wanted)
        self.told.copy_(self.counts, non_blocking=True)
        self.step += 1

    def read(self, slots: Tensor, last: Tensor, seen: Tensor, new: Tensor) -> None:
        """Take in the newest tokens."""
        place, known = (seen.clamp(min=1) - 1) % WINDOW, self.vocabulary
        self.window[slots, place] = torch.where(new, last.to(torch.int32), self.window[slots, place])
        self.seen[slots] = torch.where(new, seen, self.seen[slots])
        goes_on = (self.open[slots] - known.closes[last]).clamp(min=0)
        opens = known.opens[last].to(torch.int32)
        self.open[slots] = torch.where(new, torch.where(opens < 0, goes_on, opens), self.open[slots])
        self.mentioned[slots] = torch.where(new & known.mentions[last], seen, self.mentioned[slots])

    def look(self) -> None:
        """Look for loops in this step's share of the slots, in what is newer than a conclusion."""
        turn = self.step // (EVERY // LOOKS) % LOOKS
        if turn >= len(self.shares):
            return
        share = self.shares[turn]
        since = torch.where(self.begun[share] < NEVER, self.begun[share] + len(self.written), self.own[share] % NEVER)
        position = self.seen[share, None] - WINDOW + self.order
        window = self.window[share].gather(1, position % WINDOW)
        window = torch.where(position >= since[:, None].clamp(min=0), window, -1)
        looked_for = (self.orders[share, 0] > 0) & (self.acts | (self.begun[share] == NEVER))
        found = looping(window, self.vocabulary.words) & looked_for
        self.counts[0] += (found & ~self.found[share]).sum()
        self.found[share] |= found

    def concludes(self, slots: Tensor, seen: Tensor) -> Tensor:
        """Whether each row's newest tokens are a marker of the model's own, (R,)."""
        back = torch.arange(-self.natural.shape[1], 0, device=seen.device)
        newest = self.window[slots[:, None], (seen[:, None] + back) % WINDOW]
        enough = (self.natural >= 0).sum(1) <= seen[:, None]
        return (((newest[:, None] == self.natural) | (self.natural < 0)).all(2) & enough).any(1)

    def measure(self, logits: Tensor, slots: Tensor, reasoning: Tensor) -> None:
        """The entropy of some rows' next token, into the average of their slots."""
        first = self.step % min(SAMPLED, len(slots))
        some, rows = logits[first::SAMPLED].float(), slots[first::SAMPLED]
        probability = some.softmax(1)
        entropy = some.logsumexp(1) - (probability * some.clamp(min=-FORCE)).sum(1)
        known = self.entropy[rows]
        mean = torch.where(known > 0, 0.75 * known + 0.25 * entropy, entropy)
        self.entropy[rows] = torch.where(reasoning[first::SAMPLED], mean, known)

    def conclude(
        self, logits: Tensor, slots: Tensor, last: Tensor, seen: Tensor, reasoning: Tensor, orders: Orders,
        wanted: Orders,
    ) -> Tensor:  # fmt: skip
        """Begin a conclusion where a loop, a budget or the model's own surety asks for it, between two characters."""
        lead, ends_step = len(self.text.lead), self.vocabulary.ends_step[last]
        whole = (self.open[slots] == 0) | (seen % 8 == 0)
        loop = reasoning & self.found[slots] & (orders.loop > 0)
        budget = reasoning & (seen >= orders.budget)
        sure = torch.zeros_like(loop)
        if wanted.sure and len(self.firsts):
            likely = (logits[:, self.firsts].float().logsumexp(1) - logits.float().logsumexp(1)).exp()
            sure = reasoning & ends_step & (orders.sure > 0) & (likely >= orders.sure)
        first = torch.where(ends_step, self.written[lead], self.written[0])
        possible = logits.gather(1, first[:, None])[:, 0] > -torch.inf
        start = (loop | budget | sure) & whole & possible
        self.begun[slots] = torch.where(start, seen - lead * ends_step, self.begun[slots]).to(torch.int32)
        self.found[slots] &= ~start
        loop, budget = loop & start, budget & start & ~loop
        self.counts[1:4] += torch.stack([loop.sum(), budget.sum(), (start & ~loop & ~budget).sum()])
        return start

    def bias(
        self, logits: Tensor, slots: Tensor, seen: Tensor, live: Tensor, reasoning: Tensor, orders: Orders,
        wanted: Orders,
    ) -> None:  # fmt: skip
        """Take from the logits of words that circle, and of scripts that are not the question's."""
        known = self.vocabulary
        if wanted.circling:
            strength = torch.where(reasoning & (seen >= orders.circling_after), orders.circling, 0.0)
            logits.index_add_(1, known.circling, -strength[:, None].to(logits.dtype).expand(-1, len(known.circling)))
        if not (wanted.hold or wanted.bias):
            return
        held = live & ~reasoning & (orders.hold > 0)
        strength = torch.where(held, torch.inf, torch.where(reasoning, orders.bias, 0.0))
        strength = torch.where(self.open[slots] == 0, strength, 0.0)[:, None]  # a character that was begun is finished
        others = ~orders.scripts.to(torch.int16)[:, None]
        for first in range(0, len(logits), ROWS):
            rows = slice(first, first + ROWS)
            foreign = (known.scripts & others[rows]) != 0
            logits[rows] -= torch.where(foreign, strength[rows], 0.0)

    def write(
        self, logits: Tensor, slots: Tensor, last: Tensor, seen: Tensor, live: Tensor, reasoning: Tensor, new: Tensor,
        orders: Orders, wanted: Orders,
    ) -> None:  # fmt: skip
        """The next token of a conclusion or of a look-back, or the end of the turn, where one is due."""
        begun, length = self.begun[slots], len(self.written)
        at = seen - begun
        concluding = live & (at >= 0) & (at < length)
        second = live & ~reasoning & ~concluding & self.found[slots] & (orders.loop > 0)
        over = live & (begun < NEVER) & (at >= length + orders.limit) & ~second
        token = torch.where(second | over, self.text.end, self.written[at.clamp(0, length - 1)])
        due = concluding | second | over
        if wanted.looks and self.phrases.shape[1]:
            flat = (self.entropy[slots] > orders.look_entropy) & (seen - self.mentioned[slots] >= orders.look_after)
            between = self.vocabulary.ends_step[last] & (self.open[slots] == 0)
            start = reasoning & flat & between & (self.looks[slots] < orders.looks)
            self.looked[slots] = torch.where(start, seen, self.looked[slots])
            self.looks[slots] += start.to(torch.int32)
            self.mentioned[slots] = torch.where(start, seen, self.mentioned[slots])
            self.counts[6] += start.sum()
            at = seen - self.looked[slots]
            phrase = self.phrases[orders.chinese.long(), at.clamp(0, self.phrases.shape[1] - 1)]
            looking = reasoning & (at >= 0) & (at < self.phrases.shape[1]) & (phrase >= 0) & ~due
            token, due = torch.where(looking, phrase, token), due | looking
        if not self.acts:
            return
        current = logits.gather(1, token[:, None])
        # What something else has ruled out stays so: it is tried again, or the model goes on.
        forced = due[:, None] & (current > -torch.inf)
        logits.scatter_(1, token[:, None], torch.where(forced, torch.full_like(current, FORCE), current))
        self.counts[4:6] += torch.stack([(second & new).sum(), (over & new).sum()])


def all_ends(history: list[int], marker: Sequence[int]) -> list[int]:
    """Tokens of a history up to and with each whole marker."""
    wanted, size = list(marker), len(marker)
    return [at + size for at in range(len(history) - size + 1) if history[at : at + size] == wanted]


def first_end(history: list[int], markers: Iterable[Sequence[int]]) -> int:
    """Tokens of a history up to and with the first whole marker; 0 where there is none."""
    return min((end for marker in markers for end in all_ends(history, marker)[:1]), default=0)
