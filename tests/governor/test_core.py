"""The governor's state machine, driven token by token as a sampler drives it."""

import random
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qvq_serve.governor.core import AVERAGED, COUNTED, FORCE, Governor, Text, lower, weigh
from qvq_serve.governor.detect import EVERY, WINDOW
from qvq_serve.governor.policy import ALL_SCRIPTS, STRAY, Orders, script_bits
from qvq_serve.governor.tokens import Vocabulary

VOCABULARY = 400
END = 399
MARKER = (390, 391, 392, 391, 390)
NATURAL = ((391, 392, 393), (388, 392))
PHRASES = ((380, 381, 382, 383), (384, 385))
NEWLINE, WAIT, HAN, IMAGE, HALF, REST = 386, 387, 379, 378, 377, 376
TEXT = Text(MARKER, END, (), NATURAL, (388, 391), PHRASES)
LOOP = Orders(governed=1, loop=1, limit=30)
Model = Callable[[list[int]], int]


def vocabulary() -> Vocabulary:
    """Every token is a number, but for the few with names."""
    table = {name: torch.zeros(VOCABULARY, dtype=kind) for name, kind in (
        ("scripts", torch.int16), ("opens", torch.int8), ("closes", torch.int8), ("words", torch.int8),
        ("ends_step", torch.bool), ("mentions", torch.bool))}  # fmt: skip
    table["scripts"][HAN] = script_bits(["Han"]) & ~1
    table["scripts"][HALF], table["opens"][HALF] = script_bits(["Han"]) & ~1, 2
    table["opens"][REST], table["closes"][REST], table["scripts"][REST] = -1, 2, STRAY
    table["ends_step"][NEWLINE] = table["mentions"][IMAGE] = True
    return Vocabulary(**table, circling=torch.tensor([WAIT]))


def governing(slots: int, acts: bool = True, text: Text = TEXT) -> Governor:
    return Governor(slots, torch.device("cpu"), text, vocabulary(), acts)


def counted(governor: Governor) -> dict[str, int]:
    """What was counted, without what was not."""
    return {name: n for name, n in zip(COUNTED, governor.counts.tolist(), strict=True) if n}


def looping(period: int, from_token: int = 40) -> Model:
    """Writes something else for a while, then the same again and again."""

    def write(history: list[int]) -> int:
        at = len(history)
        return random.Random(at).randrange(300) if at < from_token else 50 + (at - from_token) % period

    return write


def honest(history: list[int]) -> int:
    return random.Random(f"honest {len(history)}").randrange(380)


def drive(
    models: list[Model], steps: int, *, acts: bool = True, text: Text = TEXT,
    order: Callable[[int], list[int]] | None = None, governed: Callable[[int], bool] = lambda _: True, **orders: int,
) -> tuple[list[list[int]], Governor]:  # fmt: skip
    """What each model writes, greedy, until it ends its turn; rows of a batch in any order."""
    governor = governing(len(models), acts, text)
    written: list[list[int]] = [[] for _ in models]
    for slot in range(len(models)):
        governor.begin([slot], [LOOP._replace(**orders) if governed(slot) else Orders()], [[]])
    for step in range(steps):
        slots = [s for s in (order(step) if order else range(len(models))) if END not in written[s]]
        if not slots:
            break
        advance(governor, slots, written, models)
    return written, governor


def advance(
    governor: Governor, slots: list[int], written: list[list[int]], models: list[Model], ruled_out: int | None = None
) -> None:
    logits = torch.zeros(len(slots), VOCABULARY)
    wanted = Orders(*governor.orders.amax(0).tolist())
    for row, slot in enumerate(slots):
        logits[row, models[slot](written[slot])] = 8.0
    if ruled_out is not None:
        logits[:, ruled_out] = -torch.inf
    last = torch.tensor([written[slot][-1] if written[slot] else 0 for slot in slots])
    seen = torch.tensor([len(written[slot]) for slot in slots])
    governor.apply(logits, torch.tensor(slots), last, seen, wanted)
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
    assert counted(governor) == {"found": 2, "loop": 1, "second_loop": 1}


def test_after_a_conclusion_the_limit_holds() -> None:
    def ends_its_loop(history: list[int]) -> int:
        return honest(history) if conclusions(history) else looping(20)(history)

    (tokens,), _ = drive([ends_its_loop], 2000, limit=30)
    (at,) = conclusions(tokens)
    assert len(tokens) == at + len(MARKER) + 30 + 1 and tokens[-1] == END


def test_a_budget_concludes_too() -> None:
    (tokens,), governor = drive([honest], 400, budget=100, limit=50)
    assert conclusions(tokens) == [100] and len(tokens) == 100 + len(MARKER) + 50 + 1
    assert counted(governor) == {"budget": 1, "limit": 1}


def test_observing_counts_and_changes_nothing() -> None:
    (tokens,), governor = drive([looping(16)], 400, acts=False)
    assert tokens == [looping(16)(tokens[:at]) for at in range(400)]
    assert counted(governor) == {"found": 1, "loop": 1}


def test_who_does_nothing_wrong_is_left_alone_to_the_bit() -> None:
    governor = governing(3)
    everything = Orders(1, 1, 10_000, 30, ALL_SCRIPTS, 1, 5.0, 3.0, 700, 2, 10_000, 0, 0.9999)
    governor.begin([0, 1, 2], [everything] * 3, [[]] * 3)
    for step in range(1, 600):
        logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(step))
        logits[0, 5] = float("-inf")  # what a grammar masks
        before = logits.clone()
        tokens = torch.tensor([random.Random(f"{step} {row}").randrange(380) for row in range(3)])
        governor.apply(logits, torch.tensor([2, 0, 1]), tokens, torch.full((3,), step), everything)
        logits[:, REST] = before[:, REST]  # half a character's end, where none was begun, is never right
        assert torch.equal(logits, before)


def test_requests_do_not_touch_each_other() -> None:
    models = [looping(16), honest, looping(33), honest]
    alone = [drive([model], 500, limit=3000)[0][0] for model in models]
    shuffled = drive(models, 500, limit=3000, order=lambda step: random.Random(step).sample(range(4), 4))[0]
    assert shuffled[1] == alone[1][: len(shuffled[1])] and shuffled[3] == alone[3][: len(shuffled[3])]
    assert len(conclusions(shuffled[0])) == len(conclusions(shuffled[2])) == 1


def test_who_is_not_governed_loops_on() -> None:
    written, governor = drive([looping(16), looping(16)], 400, governed=lambda slot: slot == 1)
    assert not conclusions(written[0]) and conclusions(written[1]) and counted(governor)["loop"] == 1


@pytest.mark.parametrize("where", ["before", "in the marker", "after"])
def test_a_preempted_request_goes_on_where_it_was(where: str) -> None:
    (whole,), _ = drive([looping(16)], 600, limit=200)
    (at,) = conclusions(whole)
    cut = {"before": at - 10, "in the marker": at + 3, "after": at + 20}[where]
    governor = governing(1)
    written = [whole[:cut]]
    governor.begin([0], [LOOP._replace(limit=200)], [written[0]])
    while END not in written[0] and len(written[0]) < 1000:
        advance(governor, [0], written, [looping(16)])
    assert len(conclusions(written[0])) == 1 and written[0][-1] == END


def test_a_character_that_was_begun_before_a_preemption_is_finished_after_it() -> None:
    """What it lacked was forgotten: its last bytes were masked, or a conclusion was written into it."""
    governor = governing(1)
    governor.begin([0], [LOOP], [[5, HALF]])
    assert governor.open.tolist() == [2]
    governor.begin([0], [LOOP], [[5, HALF, REST]])
    assert governor.open.tolist() == [0]


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_loops_are_found_in_every_stage_of_a_pipeline(stages: int) -> None:
    """Each request's turn comes every so many steps, and half of them were never looked at."""
    governor, slots = Governor(8, torch.device("cpu"), TEXT, vocabulary(), True, stages), range(8)
    models, written = [looping(16)] * 8, [[] for _ in range(8)]  # type: ignore[var-annotated]
    governor.begin(list(slots), [LOOP] * 8, [[]] * 8)
    for step in range(600 * stages):
        turn = [slot for slot in slots if slot % stages == step % stages and END not in written[slot]]
        if turn:
            advance(governor, turn, written, models)
    assert all(conclusions(tokens) for tokens in written)


def test_a_slot_forgets_who_was_in_it() -> None:
    (_,), governor = drive([looping(16)], 90)
    governor.begin([0], [LOOP], [[]])
    written: list[list[int]] = [[]]
    for _ in range(300):
        advance(governor, [0], written, [honest])
    assert not conclusions(written[0])


def test_a_request_that_is_over_is_looked_at_no_more() -> None:
    """Its loop was counted as found while others wrote on."""
    models = [looping(1, from_token=10), honest]
    gone = drive(models, 4 * EVERY, order=lambda step: [0, 1] if step < 2 * EVERY - 4 else [1])[1]
    assert counted(gone) == {}
    assert counted(drive(models, 4 * EVERY)[1])["found"] > 0


@pytest.mark.parametrize(("orders", "what"), [({"limit": 3000}, "second_loop"), ({"limit": 30}, "limit")])
def test_a_turn_that_may_not_end_yet_is_counted_once(orders: dict[str, int], what: str) -> None:
    governor = governing(1)
    written: list[list[int]] = [[]]
    governor.begin([0], [LOOP._replace(**orders)], [[]])
    for step in range(1200):
        if END in written[0]:
            break
        advance(governor, [0], written, [looping(16)], END if step < 1000 else None)
    assert len(written[0]) > 1000 and written[0][-1] == END
    assert counted(governor)[what] == 1


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
    assert len(tokens) == 700 and not conclusions(tokens) and not counted(governor)


def test_a_loop_after_its_own_conclusion_ends_the_turn() -> None:
    def loops_in_its_answer(history: list[int]) -> int:
        at = len(history) - 50
        return NATURAL[0][at] if 0 <= at < 3 else looping(16, from_token=80)(history)

    (tokens,), governor = drive([loops_in_its_answer], 700)
    assert not conclusions(tokens) and tokens[-1] == END and counted(governor) == {"found": 1, "second_loop": 1}


def test_slots_that_change_places_take_their_state_along() -> None:
    models = [looping(16), honest]
    governor = governing(2)
    written: list[list[int]] = [[], []]
    governor.begin([0, 1], [LOOP, LOOP], [[], []])
    for _ in range(100):
        advance(governor, [0, 1], written, models)
    governor.move(0, 1)
    written, models = written[::-1], models[::-1]
    for _ in range(300):
        advance(governor, [slot for slot in (0, 1) if END not in written[slot]], written, models)
    assert len(conclusions(written[1])) == 1 and not conclusions(written[0])


def steered(history: list[int], logits: dict[int, float], text: Text = TEXT, **orders: float) -> dict[int, float]:
    """The logits that a step leaves of those given, for a request that wrote this history."""
    governor = governing(1, text=text)
    asked = Orders(governed=1, limit=30)._replace(**orders)
    governor.begin([0], [asked], [[]])
    row = torch.zeros(1, VOCABULARY)
    for at, token in enumerate(history, 1):
        row = torch.zeros(1, VOCABULARY)
        for place, value in logits.items():
            row[0, place] = value
        governor.apply(row, torch.tensor([0]), torch.tensor([token]), torch.tensor([at]), asked)
    return {place: row[0, place].item() for place in logits}


def test_an_answer_keeps_to_its_scripts_and_the_reasoning_is_free() -> None:
    given = {HAN: 5.0, HALF: 4.0, 7: 1.0}
    held = {HAN: float("-inf"), HALF: float("-inf"), 7: 1.0}
    only_latin = {"hold": 1, "scripts": script_bits([])}
    assert steered([1, 2, 3], given, **only_latin) == given
    assert steered([1, *NATURAL[0]], given, **only_latin) == held
    assert steered([1, *NATURAL[0]], given, hold=1, scripts=script_bits(["Han"])) == given
    assert steered([1, *NATURAL[0]], given, hold=0, scripts=script_bits([])) == given


def test_a_character_that_was_begun_is_finished_before_anything_is_masked_or_forced() -> None:
    assert steered([1, *NATURAL[0], HALF], {HAN: 5.0, REST: 4.0}, hold=1, scripts=1) == {HAN: 5.0, REST: 4.0}
    assert steered([1, *NATURAL[0]], {REST: 4.0, 7: 1.0}, hold=1, scripts=ALL_SCRIPTS) == {REST: float("-inf"), 7: 1.0}
    assert steered([1, *NATURAL[0], HALF, REST], {HAN: 5.0}, hold=1, scripts=1) == {HAN: float("-inf")}
    assert steered([1, 2, HALF], {MARKER[0]: 0.0}, budget=2)[MARKER[0]] == 0.0
    assert steered([1, 2, HALF, REST], {MARKER[0]: 0.0}, budget=3)[MARKER[0]] == FORCE


def test_the_bias_of_the_reasoning_is_soft_and_ends_with_it() -> None:
    assert steered([1, 2], {HAN: 5.0, 7: 1.0}, bias=2.0, scripts=1) == {HAN: 3.0, 7: 1.0}
    assert steered([1, *NATURAL[0]], {HAN: 5.0}, bias=2.0, scripts=1) == {HAN: 5.0}


def test_words_that_circle_are_made_less_likely_after_a_while_in_the_reasoning() -> None:
    asked = {"circling": 3.0, "circling_after": 4}
    assert steered([1, 2, 3], {WAIT: 5.0, 7: 5.0}, **asked) == {WAIT: 5.0, 7: 5.0}
    assert steered([1, 2, 3, 4], {WAIT: 5.0, 7: 5.0}, **asked) == {WAIT: 2.0, 7: 5.0}
    assert steered([1, 2, *NATURAL[0]], {WAIT: 5.0}, **asked) == {WAIT: 5.0}


def test_what_is_ruled_out_is_not_forced() -> None:
    ruled_out = float("-inf")
    assert steered([1, 2, 3], {MARKER[0]: ruled_out}, budget=2) == {MARKER[0]: ruled_out}
    assert steered([1, *MARKER, *range(30)], {END: ruled_out}, budget=1) == {END: ruled_out}
    assert steered([1, *MARKER, *range(30)], {END: 0.0}, budget=1) == {END: FORCE}


def unsure(history: list[int]) -> int:
    """Nothing in particular: all of the vocabulary is as likely; a line ends now and then."""
    return NEWLINE if len(history) % 20 == 19 else 10 + len(history) % 301


@pytest.mark.parametrize(("chinese", "phrase"), list(enumerate(PHRASES)))
def test_a_model_that_is_unsure_long_after_it_looked_is_told_to_look_again(chinese: int, phrase: list[int]) -> None:
    asked = {"looks": 2, "look_after": 50, "look_entropy": 1, "loop": 0, "chinese": chinese}
    (tokens,), governor = drive([unsure], 400, **asked)
    at = [i for i in range(len(tokens)) if tuple(tokens[i : i + len(phrase)]) == phrase]
    assert len(at) == 2 and at[0] >= 50 and at[1] - at[0] >= 50 and tokens[at[0] - 1] == NEWLINE
    assert counted(governor) == {"look": 2}
    (tokens,), _ = drive([unsure], 400, **asked | {"look_entropy": 100})
    assert phrase[0] not in tokens

    governor, written = governing(1), [cut := list(drive([unsure], 400, **asked)[0][0][: at[0] + 2])]
    governor.begin([0], [LOOP._replace(**asked)], [cut])  # preempted within a look-back
    while len(written[0]) < 400:
        advance(governor, [0], written, [unsure])
    again = [i for i in range(400) if tuple(written[0][i : i + len(phrase)]) == phrase]
    assert len(again) == 2 and again[0] == at[0] and again[1] - again[0] >= 50

    def mentions(history: list[int]) -> int:
        return IMAGE if len(history) % 20 == 3 else unsure(history)

    (tokens,), _ = drive([mentions], 400, **asked)
    assert phrase[0] not in tokens


def test_a_model_that_is_sure_at_the_end_of_a_step_concludes() -> None:
    likely, unlikely = {NATURAL[0][0]: 6.0, MARKER[0]: 0.0}, {NATURAL[0][0]: 3.0, MARKER[0]: 0.0}  # 0.5, 0.05
    assert steered([1, NEWLINE], likely, sure=0.4)[MARKER[0]] == FORCE
    assert steered([1, 2], likely, sure=0.4)[MARKER[0]] == 0.0
    assert steered([1, NEWLINE], unlikely, sure=0.4)[MARKER[0]] == 0.0


@pytest.mark.parametrize("size", [VOCABULARY, 997])  # chunks of 16, and a prime, in one
def test_entropies_and_likelihoods_are_those_of_the_logits(size: int) -> None:
    draw = torch.Generator().manual_seed(0)
    logits, firsts = 5 * torch.randn(9, size, generator=draw), torch.tensor([3, 7])
    logits[:, ::5] = float("-inf")
    logits[2, : size // 2] = float("-inf")
    slots, seen = torch.randperm(12, generator=draw)[:9], torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 1])
    likely, entropy = torch.zeros(12), torch.zeros(12)
    entropy[slots[3]] = 2.0
    weigh(logits, slots, seen, firsts, likely, entropy)
    odds = torch.distributions.Categorical(logits=logits)
    expected = odds.entropy()
    expected[0], expected[3] = 0.0, 2.0 + (expected[3] - 2.0) / AVERAGED
    torch.testing.assert_close(entropy[slots], expected)
    torch.testing.assert_close(likely[slots], odds.probs[:, firsts].sum(1))


def test_what_goes_over_the_logits_is_compiled_for_one_row_and_for_any_number() -> None:
    compiled: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        compiled.append(str(graph))
        return graph.forward

    torch.compiler.reset()
    weighs, lowers = (torch.compile(run, backend=backend) for run in (weigh, lower))
    governor = governing(300)
    for rows in (1, 2, 3, 1, 8, 64, 300, 17):
        slots = torch.arange(rows)
        logits = torch.zeros(rows, VOCABULARY)
        weighs(logits, slots, slots, governor.firsts, governor.likely, governor.entropy)
        lowers(logits, slots, governor.vocabulary.scripts, governor.circles, *governor.lowered)
    assert len(compiled) == 4


def test_line_ends_before_a_conclusion_are_left_out_where_there_is_one() -> None:
    text = Text(MARKER, END, (NEWLINE,), NATURAL)
    assert steered([1, 2], {NEWLINE: 0.0, MARKER[0]: 0.0}, text, budget=2) == {NEWLINE: FORCE, MARKER[0]: 0.0}
    assert steered([1, NEWLINE], {NEWLINE: 0.0, MARKER[0]: 0.0}, text, budget=2) == {NEWLINE: 0.0, MARKER[0]: FORCE}


def test_a_step_that_is_run_again_does_nothing_twice() -> None:
    """A preempted request's prefill in chunks has rows whose samples are thrown away."""
    (whole,), _ = drive([looping(16)], 600)
    (at,) = conclusions(whole)
    governor, written = governing(1), [whole[: at + 3]]
    governor.begin([0], [LOOP], [written[0]])
    for _ in range(3):
        again = [list(written[0])]
        advance(governor, [0], again, [looping(16)])
    assert again[0][-1] == MARKER[3]


def test_a_step_never_waits_for_the_device_nor_depends_on_data_for_a_shape() -> None:
    """Fake tensors have no data: .item(), .cpu(), nonzero or a mask as an index raise on them."""
    everything = Orders(1, 1, 10_000, 30, 1, 1, 5.0, 3.0, 1, 2, 1, 1, 0.5, 0)
    with FakeTensorMode():
        governor = governing(5)
        logits = torch.zeros(3, VOCABULARY)
        for _ in range(EVERY):
            governor.apply(logits, torch.arange(3), torch.zeros(3, dtype=torch.int32), torch.ones(3), everything)
