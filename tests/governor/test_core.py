"""The governor's state machine, driven token by token as a sampler drives it."""

import random
from collections.abc import Callable

import pytest
import torch

from qvq_serve.governor.core import Conclusion, Governor
from qvq_serve.governor.detect import EVERY, WINDOW

VOCABULARY = 400
END = 399
MARKER = (390, 391, 392, 391, 390)
NATURAL = ((391, 392, 393), (388, 392))
Model = Callable[[list[int]], int]


def looping(period: int, from_token: int = 40) -> Model:
    """Writes something else for a while, then the same again and again."""

    def write(history: list[int]) -> int:
        at = len(history)
        return random.Random(at).randrange(300) if at < from_token else 50 + (at - from_token) % period

    return write


def honest(history: list[int]) -> int:
    return random.Random(f"honest {len(history)}").randrange(380)


def drive(
    models: list[Model], steps: int, *, acts: bool = True, limit: int = 30, budget: int | None = None,
    order: Callable[[int], list[int]] | None = None, governed: Callable[[int], bool] = lambda _: True,
) -> tuple[list[list[int]], Governor]:  # fmt: skip
    """What each model writes, greedy, until it ends its turn; rows of a batch in any order."""
    governor = Governor(len(models), torch.device("cpu"), Conclusion(MARKER, END, limit, NATURAL), acts)
    written: list[list[int]] = [[] for _ in models]
    for slot in range(len(models)):
        governor.begin(slot, [], governed(slot), budget)
    for step in range(steps):
        slots = [s for s in (order(step) if order else range(len(models))) if END not in written[s]]
        if not slots:
            break
        advance(governor, slots, written, models)
    return written, governor


def advance(governor: Governor, slots: list[int], written: list[list[int]], models: list[Model]) -> None:
    logits = torch.zeros(len(slots), VOCABULARY)
    for row, slot in enumerate(slots):
        logits[row, models[slot](written[slot])] = 8.0
    last = torch.tensor([written[slot][-1] if written[slot] else 0 for slot in slots])
    seen = torch.tensor([len(written[slot]) for slot in slots])
    governor.apply(logits, torch.tensor(slots), last, seen)
    for slot, token in zip(slots, logits.argmax(1).tolist(), strict=True):
        written[slot].append(token)


def conclusions(tokens: list[int]) -> list[int]:
    """Where the marker stands whole."""
    return [at for at in range(len(tokens)) if tuple(tokens[at : at + len(MARKER)]) == MARKER]


@pytest.mark.parametrize("period", [1, 7, 60, 300])
def test_a_loop_is_made_to_conclude_and_a_second_one_ends_the_turn(period: int) -> None:
    (tokens,), governor = drive([looping(period)], 4000, limit=3000)
    (at,) = conclusions(tokens)
    assert 40 + period < at <= 40 + 3 * max(period, 48) + 2 * EVERY
    assert tokens[-1] == END and len(tokens) - at < 3 * max(period, 48) + 3 * EVERY + len(MARKER)
    assert governor.counts.tolist() == [2, 1, 1, 0]


def test_after_a_conclusion_the_limit_holds() -> None:
    def ends_its_loop(history: list[int]) -> int:
        return honest(history) if conclusions(history) else looping(20)(history)

    (tokens,), _ = drive([ends_its_loop], 2000, limit=30)
    (at,) = conclusions(tokens)
    assert len(tokens) == at + len(MARKER) + 30 + 1 and tokens[-1] == END


def test_a_budget_concludes_too() -> None:
    (tokens,), governor = drive([honest], 400, budget=100, limit=50)
    assert conclusions(tokens) == [100] and len(tokens) == 100 + len(MARKER) + 50 + 1
    assert governor.counts.tolist() == [0, 1, 1, 1]


def test_observing_counts_and_changes_nothing() -> None:
    (tokens,), governor = drive([looping(16)], 400, acts=False)
    assert tokens == [looping(16)(tokens[:at]) for at in range(400)]
    assert governor.counts.tolist()[0] == 1 and governor.counts.tolist()[1:] == [0, 0, 0]


def test_who_does_nothing_wrong_is_left_alone_to_the_bit() -> None:
    governor = Governor(3, torch.device("cpu"), Conclusion(MARKER, END, 30), True)
    for slot in range(3):
        governor.begin(slot, [], True, None)
    for step in range(1, 600):
        logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(step))
        logits[0, 5] = float("-inf")  # what a grammar masks
        before = logits.clone()
        tokens = torch.tensor([random.Random(f"{step} {row}").randrange(380) for row in range(3)])
        governor.apply(logits, torch.tensor([2, 0, 1]), tokens, torch.full((3,), step))
        assert torch.equal(logits, before)


def test_requests_do_not_touch_each_other() -> None:
    models = [looping(16), honest, looping(33), honest]
    alone = [drive([model], 500, limit=3000)[0][0] for model in models]
    shuffled = drive(models, 500, limit=3000, order=lambda step: random.Random(step).sample(range(4), 4))[0]
    assert shuffled[1] == alone[1][: len(shuffled[1])] and shuffled[3] == alone[3][: len(shuffled[3])]
    assert len(conclusions(shuffled[0])) == len(conclusions(shuffled[2])) == 1


def test_who_is_not_governed_loops_on() -> None:
    written, governor = drive([looping(16), looping(16)], 400, governed=lambda slot: slot == 1)
    assert not conclusions(written[0]) and conclusions(written[1]) and governor.counts.tolist()[0] >= 1


@pytest.mark.parametrize("where", ["before", "in the marker", "after"])
def test_a_preempted_request_goes_on_where_it_was(where: str) -> None:
    (whole,), _ = drive([looping(16)], 600, limit=200)
    (at,) = conclusions(whole)
    cut = {"before": at - 10, "in the marker": at + 3, "after": at + 20}[where]
    governor = Governor(1, torch.device("cpu"), Conclusion(MARKER, END, 200), True)
    written = [whole[:cut]]
    governor.begin(0, written[0], True, None)
    while END not in written[0] and len(written[0]) < 1000:
        advance(governor, [0], written, [looping(16)])
    assert len(conclusions(written[0])) == 1 and written[0][-1] == END


def test_a_slot_forgets_who_was_in_it() -> None:
    (_,), governor = drive([looping(16)], 90)
    governor.begin(0, [], True, None)
    written: list[list[int]] = [[]]
    for _ in range(300):
        advance(governor, [0], written, [honest])
    assert not conclusions(written[0])


def test_a_text_longer_than_the_window_is_looked_at_where_it_is_new() -> None:
    (tokens,), _ = drive([looping(16, from_token=WINDOW + 500)], WINDOW + 900)
    (at,) = conclusions(tokens)
    assert at > WINDOW + 500


@pytest.mark.parametrize("marker", NATURAL)
def test_who_concludes_by_itself_is_not_made_to_and_has_no_limit(marker: tuple[int, ...]) -> None:
    def concludes(history: list[int]) -> int:
        at = len(history) - 50
        return marker[at] if 0 <= at < len(marker) else honest(history)

    (tokens,), governor = drive([concludes], 700, limit=30, budget=200)
    assert len(tokens) == 700 and not conclusions(tokens) and governor.counts.tolist() == [0, 0, 0, 0]


def test_a_loop_after_its_own_conclusion_ends_the_turn() -> None:
    def loops_in_its_answer(history: list[int]) -> int:
        at = len(history) - 50
        return NATURAL[0][at] if 0 <= at < 3 else looping(16, from_token=80)(history)

    (tokens,), governor = drive([loops_in_its_answer], 700)
    assert not conclusions(tokens) and tokens[-1] == END and governor.counts.tolist() == [1, 0, 1, 0]


def test_slots_that_change_places_take_their_state_along() -> None:
    models = [looping(16), honest]
    governor = Governor(2, torch.device("cpu"), Conclusion(MARKER, END, 30), True)
    written: list[list[int]] = [[], []]
    for slot in range(2):
        governor.begin(slot, [], True, None)
    for _ in range(100):
        advance(governor, [0, 1], written, models)
    governor.move(0, 1)
    written, models = written[::-1], models[::-1]
    for _ in range(300):
        advance(governor, [slot for slot in (0, 1) if END not in written[slot]], written, models)
    assert len(conclusions(written[1])) == 1 and not conclusions(written[0])
