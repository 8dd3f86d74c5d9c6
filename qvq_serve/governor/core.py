"""What each request has written and what it may write next: a state machine on tensors, one row a slot.

Nothing here waits for the device, has a shape that depends on data, or loops over requests; all state is a function of
the request's tokens and of the step's number, so that the ranks of a tensor-parallel group agree, and a step that is
run again (a prefill in chunks, after a preemption) does nothing twice. What is decided is decided for all slots at
once, in tensors that stay where they are: on a GPU by CUDA graphs of what torch.compile made of the hundreds of small
kernels. One by one the host took 3 ms to launch them, and as they were a graph of them took 0.3 ms (H100, 2026-11).

Shapes: S slots, R rows of a batch, V vocabulary, W window.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

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
CHUNKS = 32
"""Most parts of a row of logits, each of which is summed by itself: one row alone would keep one processor busy."""
AVERAGED = 8
"""Tokens over which the entropy is averaged, about."""
SCRIPTS_COLUMN = Orders._fields.index("scripts")
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
    firsts: tuple[int, ...] = ()
    """Tokens that begin such a marker, and little else."""
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

    def __init__(
        self, slots: int, device: torch.device, text: Text, vocabulary: Vocabulary, acts: bool, stages: int = 1
    ) -> None:
        """`stages`: of a pipeline, in which each request's turn comes every so many steps."""

        def each(value: int, kind: torch.dtype = torch.int32) -> Tensor:
            return torch.full((slots,), value, dtype=kind, device=device)

        self.text, self.acts, self.stages, self.step = text, acts, stages, 0
        self.orders = torch.zeros(slots, len(Orders._fields), device=device)
        self.window = torch.full((slots, WINDOW), -1, dtype=torch.int32, device=device)
        """The last tokens of each request's output, a ring: output token i lies at i % WINDOW."""
        self.seen, self.begun, self.own, self.looked = each(0), each(NEVER), each(NEVER), each(NEVER)
        """Counts of output tokens: so far; when a conclusion was begun; when the model's own stood; when the last
        look-back was begun."""
        self.found, self.over = each(0, torch.bool), each(0, torch.bool)
        """A loop was found; the turn is to end."""
        self.open, self.looks, self.mentioned = each(0), each(0), each(0)
        """Bytes that the newest character lacks; look-backs so far; where the image was mentioned."""
        self.entropy = each(0, torch.float32)
        """Nats, averaged over the last AVERAGED tokens; 0 before the first."""
        self.counts = torch.zeros(len(COUNTED), dtype=torch.int64, device=device)
        self.told = torch.zeros(len(COUNTED), dtype=torch.int64, pin_memory=device.type == "cuda")
        """The counts on the host, some steps old; reading them waits for nothing."""
        self.written = torch.tensor([*text.lead, *text.conclusion], device=device)
        self.natural = padded(text.natural, front=True).to(device)
        self.phrases = padded(text.phrases, front=False).to(device)
        self.firsts = torch.tensor(text.firsts, dtype=torch.int64, device=device)
        self.vocabulary = Vocabulary(*(table.to(device) for table in vars(vocabulary).values()))
        self.circles = torch.zeros_like(self.vocabulary.ends_step).index_fill_(0, self.vocabulary.circling, True)
        self.order = torch.arange(WINDOW, device=device)
        self.back = torch.arange(-self.natural.shape[1], 0, device=device)
        self.shares = [torch.arange(first, slots, LOOKS, device=device) for first in range(min(LOOKS, slots))]
        # What a step brings in, by slot: the newest token, its count (0: no row), whether the first tokens of a
        # conclusion can be sampled, and how likely the model's own marker is; and what is decided.
        self.last, self.count = each(0, torch.int64), each(0)
        self.possible, self.likely = torch.zeros(slots, 2, dtype=torch.bool, device=device), each(0, torch.float32)
        self.token, self.due = each(0, torch.int64), each(0, torch.bool)
        self.circling, self.foreign = each(0, torch.float32), each(0, torch.float32)
        self.lowered = (self.orders, self.foreign, self.circling)
        self.choices = self.written[[0, len(text.lead)]]
        self.weigh, self.lower = weigh, lower
        self.graphs: list[torch.cuda.CUDAGraph] = []
        if device.type == "cuda":
            with torch.cuda.device(device):
                self.compile()
                self.capture()

    def compile(self) -> None:
        """Compile what goes over whole rows of logits, for any number of rows: 1, which is its own case, and more."""
        self.weigh, self.lower = torch.compile(weigh), torch.compile(lower)
        size, device = len(self.vocabulary.scripts), self.orders.device
        with torch.inference_mode():  # as vLLM's workers run; what is compiled elsewhere would be compiled again
            for rows in (1, 2, 3):  # torch finds out by the second that they differ, and compiles for all
                logits = torch.zeros(rows, size, device=device)
                slots, seen = (torch.zeros(rows, dtype=kind, device=device) for kind in (torch.int64, torch.int32))
                self.weigh(logits, slots, seen, self.firsts, self.likely, self.entropy)
                self.lower(logits, slots, self.vocabulary.scripts, self.circles, *self.lowered)

    def capture(self) -> None:
        """Record what is decided, and a look at each share, as CUDA graphs; as yet there are no requests."""
        pool = torch.cuda.graph_pool_handle()
        decide, look = (torch.compile(run, dynamic=False) for run in (self.decide, self.look))
        runs: list[Callable[[], None]] = [decide, *(partial(look, share) for share in self.shares)]
        for run in runs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                run()
            self.graphs.append(graph)

    def begin(self, slots: list[int], orders: list[Orders], histories: list[list[int]]) -> None:
        """Requests come into slots, each with what it wrote before it was preempted."""
        device = self.orders.device
        pinned = torch.tensor(orders, dtype=torch.float32, pin_memory=device.type == "cuda")
        places = torch.tensor(slots, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        self.orders[places] = pinned.to(device, non_blocking=True)
        for state in (self.begun, self.own, self.looked):
            state.index_fill_(0, places, NEVER)
        for state in (self.seen, self.found, self.over, self.open, self.looks, self.mentioned, self.entropy):
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
        for phrase in text.phrases:  # one that is half written
            if begun := next((k for k in range(len(phrase) - 1, 1, -1) if history[-k:] == list(phrase[:k])), 0):
                self.looked[slot] = seen - begun
                ends.append(seen - begun)
        says = self.vocabulary.mentions[self.order.new_tensor(history)]
        said = (says * torch.arange(1, seen + 1, device=says.device)).max()
        self.looks[slot], self.mentioned[slot] = len(ends), said.clamp(min=max(ends, default=0))
        for token in history[-4:]:  # of the longest character
            opens, closes = self.vocabulary.opens[token], self.vocabulary.closes[token]
            self.open[slot] = torch.where(opens < 0, (self.open[slot] - closes).clamp(min=0), opens)

    def move(self, source: int, target: int) -> None:
        """Two slots change places."""
        for state in (self.orders, self.window, self.seen, self.begun, self.own, self.looked, self.found, self.over,
                      self.open, self.looks, self.mentioned, self.entropy):  # fmt: skip
            state[[source, target]] = state[[target, source]]

    def apply(self, logits: Tensor, slots: Tensor, last: Tensor, seen: Tensor, wanted: Orders) -> None:
        """Look at the newest token of each row, and steer the next one where that is due.

        `logits` (R, V) is changed in place; `slots` (R,) int64; `last` (R,) the newest token; `seen` (R,) output tokens
        so far, 0 or less for a row that has none yet; `wanted` the largest of the rows' orders, known on the host: what
        nobody wants is not run.
        """
        seen = seen.to(torch.int32)  # as `weigh` was compiled for
        self.count.zero_()
        self.count[slots] = seen
        self.last[slots] = last.long()
        self.possible[slots] = logits[:, self.choices] > -torch.inf
        if wanted.sure or wanted.looks:
            self.weigh(logits, slots, seen, self.firsts, self.likely, self.entropy)
        every = EVERY // LOOKS * self.stages
        share = self.step // every % LOOKS
        looks = self.step % every < self.stages and share < len(self.shares)
        self.step += 1
        if self.graphs:
            if looks:
                self.graphs[1 + share].replay()
            self.graphs[0].replay()
        else:
            if looks:
                self.look(self.shares[share])
            self.decide()
        self.told.copy_(self.counts, non_blocking=True)
        if self.acts:
            self.steer(logits, slots, wanted)

    def look(self, share: Tensor) -> None:
        """Look for loops in some slots, in what is newer than a conclusion."""
        since = torch.where(self.begun[share] < NEVER, self.begun[share] + len(self.written), self.own[share] % NEVER)
        position = self.seen[share, None] - WINDOW + self.order
        window = self.window[share].gather(1, position % WINDOW)
        window = torch.where(position >= since[:, None].clamp(min=0), window, -1)
        looked_for = (self.orders[share, 0] > 0) & (self.count[share] > 0)  # a request that is over leaves its orders
        if not self.acts:
            looked_for &= self.begun[share] == NEVER
        found = looping(window, self.vocabulary.words) & looked_for
        self.counts[0] += (found & ~self.found[share]).sum()
        self.found[share] |= found

    def decide(self) -> None:
        """From each slot's newest token: what comes next, and what is made less likely."""
        orders, known = Orders(*self.orders.unbind(1)), self.vocabulary
        last, seen = self.last, self.count
        live = (orders.governed > 0) & (seen > 0)
        new = live & (seen > self.seen)
        place = ((seen.clamp(min=1) - 1) % WINDOW)[:, None].long()
        newest = torch.where(new[:, None], last[:, None].to(torch.int32), self.window.gather(1, place))
        self.window.scatter_(1, place, newest)
        self.seen.copy_(torch.where(new, seen, self.seen))
        opens, ends_step = known.opens[last].to(torch.int32), known.ends_step[last]
        goes_on = (self.open - known.closes[last]).clamp(min=0)
        self.open.copy_(torch.where(new, torch.where(opens < 0, goes_on, opens), self.open))
        self.mentioned.copy_(torch.where(new & known.mentions[last], seen, self.mentioned))

        reasoning = live & (self.begun == NEVER) & (self.own == NEVER)
        own = reasoning & self.concludes(seen)
        self.own.copy_(torch.where(own, seen, self.own))
        reasoning = reasoning & ~own
        start = self.conclude(reasoning, seen, ends_step, orders)
        reasoning = reasoning & ~start
        self.found.logical_and_(~(own | start))

        length = len(self.written)
        at = seen - self.begun
        concluding = live & (at >= 0) & (at < length)
        second = live & ~reasoning & ~concluding & self.found & (orders.loop > 0)
        over = live & (self.begun < NEVER) & (at >= length + orders.limit) & ~second
        if self.acts:  # `min_tokens` may keep the turn from its end for a while
            first = new & ~self.over
            self.counts[4:6] += torch.stack([(second & first).sum(), (over & first).sum()])
            self.over.logical_or_(new & (second | over))
        phrase, looking = self.look_back(reasoning, seen, ends_step, orders)
        marker = self.written[at.clamp(0, length - 1)]
        token = torch.where(second | over, self.text.end, torch.where(concluding, marker, phrase))
        self.token.copy_(token)
        self.due.copy_(concluding | second | over | looking)
        self.circling.copy_(torch.where(reasoning & (seen >= orders.circling_after), orders.circling, 0.0))
        held = live & ~reasoning & (orders.hold > 0)
        strength = torch.where(held, torch.inf, torch.where(reasoning, orders.bias, 0.0))
        self.foreign.copy_(torch.where(self.open == 0, strength, 0.0))  # a character that was begun is finished

    def concludes(self, seen: Tensor) -> Tensor:
        """Whether each slot's newest tokens are a marker of the model's own, (S,)."""
        if not len(self.back):
            return torch.zeros_like(self.due)
        newest = self.window.gather(1, (seen[:, None] + self.back) % WINDOW)
        enough = (self.natural >= 0).sum(1) <= seen[:, None]
        return (((newest[:, None] == self.natural) | (self.natural < 0)).all(2) & enough).any(1)

    def conclude(self, reasoning: Tensor, seen: Tensor, ends_step: Tensor, orders: Orders) -> Tensor:
        """Begin a conclusion where a loop, a budget or the model's own surety asks for it, between two characters."""
        loop = reasoning & self.found & (orders.loop > 0)
        budget = reasoning & (seen >= orders.budget)
        sure = reasoning & ends_step & (orders.sure > 0) & (self.likely >= orders.sure)
        whole = (self.open == 0) | (seen % 8 == 0)
        possible = torch.where(ends_step, self.possible[:, 1], self.possible[:, 0])
        start = (loop | budget | sure) & whole & possible
        self.begun.copy_(torch.where(start, seen - len(self.text.lead) * ends_step, self.begun))
        loop, budget = loop & start, budget & start & ~loop
        self.counts[1:4] += torch.stack([loop.sum(), budget.sum(), (start & ~loop & ~budget).sum()])
        return start

    def look_back(self, reasoning: Tensor, seen: Tensor, ends_step: Tensor, orders: Orders) -> tuple[Tensor, Tensor]:
        """(the next token of a look-back, whether it is due), (S,) each."""
        size = self.phrases.shape[1]
        if not size:
            return torch.zeros_like(self.token), torch.zeros_like(self.due)
        flat = (self.entropy > orders.look_entropy) & (seen - self.mentioned >= orders.look_after)
        start = reasoning & flat & ends_step & (self.open == 0) & (self.looks < orders.looks)
        self.looked.copy_(torch.where(start, seen, self.looked))
        self.mentioned.copy_(torch.where(start, seen, self.mentioned))
        self.looks += start.to(torch.int32)
        self.counts[6] += start.sum()
        at = seen - self.looked
        phrase = self.phrases[orders.chinese.long(), at.clamp(0, size - 1)]
        return phrase, reasoning & (at >= 0) & (at < size) & (phrase >= 0)

    def steer(self, logits: Tensor, slots: Tensor, wanted: Orders) -> None:
        """Put into the rows' logits what was decided for their slots."""
        if wanted.circling or wanted.hold or wanted.bias:
            self.lower(logits, slots, self.vocabulary.scripts, self.circles, *self.lowered)
        token = self.token[slots, None].clamp(min=0)
        current = logits.gather(1, token)
        # What something else has ruled out stays so: it is tried again, or the model goes on.
        forced = self.due[slots, None] & (current > -torch.inf)
        logits.scatter_(1, token, torch.where(forced, FORCE, current))


def weigh(logits: Tensor, slots: Tensor, seen: Tensor, firsts: Tensor, likely: Tensor, entropy: Tensor) -> None:
    """How likely each row's next token is one of `firsts`, into `likely` (S,), and its entropy into `entropy` (S,).

    `logits` (R, V), `slots` and `seen` (R,); a row that has no token yet leaves the entropy as it is.
    """
    size = logits.shape[1]
    parts = logits.float().unflatten(1, (next(n for n in range(CHUNKS, 0, -1) if size % n == 0), -1))
    highest = parts.amax(2).clamp(min=-FORCE)
    mass = (parts - highest[:, :, None]).exp()
    moment = (mass * parts.clamp(min=-FORCE)).sum(2)
    top = highest.amax(1)
    scale = (highest - top[:, None]).exp()
    whole = (mass.sum(2) * scale).sum(1)
    total = top + whole.log()
    if len(firsts):
        likely[slots] = (logits[:, firsts].float().logsumexp(1) - total).exp()
    now, known = total - (moment * scale).sum(1) / whole, entropy[slots]
    mean = torch.where(known > 0, known + (now - known) / AVERAGED, now)
    entropy[slots] = torch.where(seen > 0, mean, known)


def lower(
    logits: Tensor, slots: Tensor, scripts: Tensor, circles: Tensor, orders: Tensor, foreign: Tensor, circling: Tensor
) -> None:
    """Lower the logits (R, V) of other scripts' tokens by `foreign` (S,), and of those that circle by `circling` (S,).

    `scripts` and `circles` (V,) are the vocabulary's, `orders` each slot's.
    """
    others = ~orders[slots, SCRIPTS_COLUMN].to(torch.int16)[:, None]
    logits.sub_(torch.where((scripts & others) != 0, foreign[slots, None], 0.0)
                + torch.where(circles, circling[slots, None], 0.0))  # fmt: skip


def all_ends(history: list[int], marker: Sequence[int]) -> list[int]:
    """Tokens of a history up to and with each whole marker."""
    wanted, size = list(marker), len(marker)
    return [at + size for at in range(len(history) - size + 1) if history[at : at + size] == wanted]


def first_end(history: list[int], markers: Iterable[Sequence[int]]) -> int:
    """Tokens of a history up to and with the first whole marker; 0 where there is none."""
    return min((end for marker in markers for end in all_ends(history, marker)[:1]), default=0)
