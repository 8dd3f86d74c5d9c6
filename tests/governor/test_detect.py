"""Loops are found in time, honest text is left alone, and the verdict depends on nothing but a row's own tokens.

The seeds are odd: held out of tuning. The whole measurement is benchmarks/detection.py.
"""

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qvq_serve.governor.detect import EVERY, MORE, PERIOD, WINDOW, looping, repetition, words_of
from tests.governor import cases

GRACE = EVERY + MORE
SEEDS = range(1, 17, 2)
IN_TIME = ("exact", "shuffled", "growing", "two_languages", "tables", "latex", "digits", "whitespace", "returns")
NEARLY = ("renumbered", "edits", "alternating", "code")
"""Near-exact copies: of these two in 20 may be late; benchmarks/detection.py has the shares."""


def found_within(case: cases.Case) -> int | None:
    """Tokens from the loop's start to the find."""
    at = cases.first_find(case, cases.words())
    return None if at is None or case.start is None else at - case.start


@pytest.fixture(scope="module")
def window() -> torch.Tensor:
    """The ends of eight loops, of eight honest texts, and of one that has just begun, shuffled."""
    loops = [cases.loop(kind, 1, GRACE) for kind in cases.LOOPS][:8]
    texts = [cases.honest(kind, 1, 3000) for kind in cases.HONEST][:8]
    rows = [cases.windows(case.tokens, [len(case.tokens)]) for case in loops + texts]
    rows.append(cases.windows(texts[0].tokens, [100]))
    return torch.cat(rows)[torch.randperm(17, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("kind", IN_TIME)
def test_a_loop_is_found_within_two_periods_and_two_looks_or_1536_tokens(kind: str) -> None:
    for seed in SEEDS:
        case = cases.loop(kind, seed, GRACE)
        within = found_within(case)
        assert within is not None and 0 < within <= case.within, f"seed {seed}: {within}, due {case.within}"


@pytest.mark.parametrize("kind", NEARLY)
def test_a_near_exact_loop_is_found_within_two_periods_and_two_looks_eighteen_times_in_twenty(kind: str) -> None:
    late = []
    for seed in range(1, 41, 2):
        case = cases.loop(kind, seed, GRACE)
        within = found_within(case)
        assert within is not None and 0 < within <= 2 * case.within, f"seed {seed}: {within}, due {2 * case.within}"
        late += [seed] if within > case.within else []
    assert len(late) <= 2, late


def test_loops_that_were_reported_in_public_are_found_in_time() -> None:
    late = {
        case.kind: found_within(case)
        for case in cases.public(GRACE)
        if not 0 < (found_within(case) or 0) <= case.within
    }
    assert late == {}


@pytest.mark.parametrize("kind", cases.HONEST)
def test_honest_text_is_no_loop(kind: str) -> None:
    for seed in (1, 3, 5):
        assert cases.first_find(cases.honest(kind, seed), cases.words()) is None, f"seed {seed}"


def test_a_function_copied_under_another_name_is_no_loop() -> None:
    """Python's pickle.py has load_binunicode, load_binunicode8 and load_binbytes8 in a row: 94 % the same."""
    before, name, after = (Path(json.__file__).parents[1] / "pickle.py").read_text().partition("def load_binbytes8")
    tokens = cases.encode(before + name + after)
    start = len(cases.encode(before))
    window = cases.windows(tokens, list(range(start - 100, start + 200, 4)))
    assert not looping(window, cases.words()).any()


def test_a_table_of_truth_values_is_no_loop() -> None:
    """Python's dataclasses.py has one of 16 rows that are each one of a few before, in another order."""
    tokens = cases.encode((Path(json.__file__).parents[1] / "dataclasses.py").read_text().partition("\n}\n")[0])
    window = cases.windows(tokens, list(range(EVERY, len(tokens), 16)))
    assert not looping(window, cases.words()).any()


@pytest.mark.parametrize(
    ("row", "loops"),
    [
        ("Step {i}: The ratio of the vector to the vertex is 1305.\n", True),  # only its number is new
        (
            '({i}) As in {j}, but for {i}: with open("corner.csv") as r:\n    rows = [line.split() for line in r]\n',
            True,
        ),
        ("Step {i}: The ratio of the {noun} to the {other} is 1305.\n", False),  # two words are new
        (
            '({i}) As in {j}, but for {i}: with open("{noun}.csv") as r:\n    rows = [line.split() for line in r]\n',
            False,
        ),  # a word is, in code
        ("{i} = {j} + 1\n", False),  # there are no words
        ("Step {i}: The ratio of {m} to {n} is {k}.\n", False),  # the numbers are what it says
    ],
)
def test_a_list_is_a_loop_where_only_its_number_is_new(row: str, loops: bool) -> None:
    nouns = cases.POOLS["noun"]
    lines = [
        row.format(i=i, j=i - 1, k=i * 7919 % 997, m=i * i, n=5000 // i, noun=nouns[i], other=nouns[-i])
        for i in range(11, 60)
    ]
    tokens = cases.encode("".join(lines))
    found = looping(cases.windows(tokens, list(range(EVERY, len(tokens), EVERY))), cases.words())
    assert found.any().item() is loops


def test_a_proof_by_cases_and_what_it_restates_are_no_loop() -> None:
    """Here the generator once said a paragraph three times in a row, which is one."""
    assert cases.first_find(cases.honest("proofs", 273), cases.words()) is None


def test_nothing_written_is_no_loop() -> None:
    found = repetition(torch.full((2, WINDOW), -1), cases.words())
    assert found.looping.tolist() == [False, False]
    assert found.period.tolist() == [0, 0]


@pytest.mark.parametrize("period", [1, 2, 7, 64, 100, PERIOD])
def test_the_period_is_a_multiple_of_the_loops_own(period: int) -> None:
    unit = torch.randperm(1000, generator=torch.Generator().manual_seed(period))[:period]
    found = repetition(unit.repeat(WINDOW // period + 1)[None, :WINDOW], cases.words())
    assert found.looping.item()
    assert found.period.item() % period == 0 and 0 < found.period.item() <= PERIOD


def test_a_paragraph_said_twice_is_no_loop_and_said_again_it_is() -> None:
    before, unit = cases.honest("reasoning", 1, 1000).tokens, cases.honest("reasoning", 3, 200).tokens
    twice, again = before + 2 * unit, before + 2 * unit + unit[: EVERY + 1]
    window = torch.cat([cases.windows(text, [len(text)]) for text in (twice, again)])
    assert looping(window, cases.words()).tolist() == [False, True]


def test_a_row_is_judged_alone(window: torch.Tensor) -> None:
    whole = repetition(window, cases.words())
    assert 0 < whole.looping.sum() < len(window)  # both verdicts are there, else the rest says nothing
    order = torch.arange(len(window) - 1, -1, -1)
    turned = repetition(window[order], cases.words())
    alone = [repetition(row[None], cases.words()) for row in window]
    for field in range(2):
        assert torch.equal(turned[field], whole[field][order])
        assert torch.equal(torch.cat([one[field] for one in alone]), whole[field])


def test_int32_is_judged_as_int64(window: torch.Tensor) -> None:
    for narrow, wide in zip(repetition(window.int(), cases.words()), repetition(window, cases.words()), strict=True):
        assert torch.equal(narrow, wide)


def test_the_window_is_left_as_it_was(window: torch.Tensor) -> None:
    before = window.clone()
    repetition(window, cases.words())
    assert torch.equal(window, before)


def test_tokens_of_another_vocabulary_give_the_same_verdict(window: torch.Tensor) -> None:
    """Only equality counts: ids shifted by a constant, and the mask with them."""
    shifted = torch.where(window >= 0, window + 1000, window)
    words = torch.nn.functional.pad(cases.words(), (1000, 0))
    assert torch.equal(repetition(shifted, words).looping, repetition(window, cases.words()).looping)


def test_a_look_never_waits_for_the_device_nor_depends_on_data_for_a_shape() -> None:
    """Fake tensors have no data: .item(), .cpu(), nonzero or a mask as an index raise on them."""
    with FakeTensorMode():
        found = repetition(torch.zeros(5, WINDOW, dtype=torch.int32), torch.zeros(1000, dtype=torch.int8))
    assert [field.shape for field in found] == [(5,)] * 2


def test_words_are_letters_of_any_script_and_numbers_digits() -> None:
    vocabulary = [" the", "图", "7", " |", "\n", "x1", "\ufffd", "é", " 42", "1.5"]
    assert words_of(lambda ids: vocabulary[ids[0]], 10).tolist() == [2, 2, 1, 0, 0, 0, 0, 2, 1, 0]


def test_the_generator_gives_the_same_text_again() -> None:
    assert cases.loop("edits", 7, GRACE) == cases.loop("edits", 7, GRACE)
    assert cases.honest("mixed", 7, 500) != cases.honest("mixed", 9, 500)


def test_recorded_loops_are_read(tmp_path: Path) -> None:
    rows = [
        {"tokens": [1, 2, 3] * 200, "start": 0, "period": 3},
        {"tokens": [5] * 9, "start": 2, "period": None, "more": 1},
    ]
    (tmp_path / "demo.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = cases.recorded(tmp_path / "demo.jsonl", GRACE)
    assert (first.kind, first.period, first.within, second.within) == ("demo", 3, 6 + GRACE, cases.WITHIN)
    assert cases.first_find(first, cases.words()) is not None
