"""What is known of a vocabulary, on Qwen's own."""

import pytest
import torch

from qvq_serve.governor.core import first_end
from qvq_serve.governor.policy import STRAY, script_bits
from qvq_serve.governor.tokens import (
    Vocabulary,
    conclusion_tokens,
    encoded,
    left_open,
    marker_firsts,
    natural_markers,
    read_vocabulary,
    spelled,
)
from tests.engine.test_reasoning import tokenizer

SIZE = 152_064


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return read_vocabulary(tokenizer(), SIZE)


def token(text: str) -> int:
    (found,) = encoded(tokenizer(), text)
    return found


@pytest.mark.parametrize(("text", "scripts"), [
    (" the", ["Latin"]), ("图片", ["Han"]), (" и", ["Cyrillic"]), ("한", ["Hangul"]), ("の", ["Hiragana"]),
])  # fmt: skip
def test_scripts_of_tokens(vocabulary: Vocabulary, text: str, scripts: list[str]) -> None:
    latin = 1 if "Latin" in scripts else 0
    assert vocabulary.scripts[token(text)] == (script_bits(scripts) & ~1 | latin)


@pytest.mark.parametrize("text", ["7", " +", "**", "\n\n", "α", "。", "\\"])
def test_digits_symbols_and_greek_have_no_script(vocabulary: Vocabulary, text: str) -> None:
    assert vocabulary.scripts[token(text)] == 0


def test_a_token_that_begins_within_a_character_belongs_to_no_script(vocabulary: Vocabulary) -> None:
    fragments = [each for each in range(len(tokenizer())) if vocabulary.opens[each] < 0]
    assert len(fragments) >= 64 and all(vocabulary.scripts[each] & STRAY for each in fragments)
    assert not vocabulary.scripts[token("图")] & STRAY


def test_special_tokens_and_what_is_beyond_the_tokenizer_are_neutral(vocabulary: Vocabulary) -> None:
    end = tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert vocabulary.scripts[[end, SIZE - 1]].tolist() == [0, 0]
    assert vocabulary.scripts.shape == vocabulary.words.shape == (SIZE,)


@pytest.mark.parametrize(("spelling", "opens"), [
    (b"abc", 0), ("图".encode(), 0), ("图".encode()[:1], 2), ("图".encode()[:2], 1), (b"a" + "图".encode()[:2], 1),
    ("图".encode()[1:], -1), ("😀".encode()[:3], 1), (b"", 0),
])  # fmt: skip
def test_a_character_cut_in_two_is_seen_at_both_sides(spelling: bytes, opens: int) -> None:
    assert left_open(spelling)[0] == opens


def test_text_of_any_kind_is_whole_where_its_tokens_say_so(vocabulary: Vocabulary) -> None:
    """The count of missing bytes, kept as the governor keeps it, is 0 exactly where the bytes so far decode."""
    text = "図を見る: 𠮷野家 😀 ñandú ∑ 한글, и ещё раз 图片里有 3 个。" * 3
    ids, missing, sofar = encoded(tokenizer(), text), 0, b""
    spelling = spelled(tokenizer(), len(tokenizer()))
    for each in ids:
        opens = int(vocabulary.opens[each])
        missing = max(missing - int(vocabulary.closes[each]), 0) if opens < 0 else opens
        sofar += spelling[each]
        assert (missing == 0) == ("\ufffd" not in sofar.decode("utf-8", "replace"))
    assert sofar.decode() == text and any(vocabulary.opens[each] > 0 for each in ids)


def test_the_conclusion_reads_as_the_models_own_and_is_tokenised_as_no_model_does() -> None:
    lead, marker = conclusion_tokens(tokenizer())
    assert tokenizer().decode([*lead, *marker]) == "\n\n**Final Answer**\n\n"
    assert list(marker) != encoded(tokenizer(), "**Final Answer**\n\n") and marker[:3] in natural_markers(tokenizer())


def test_words_that_circle_and_that_mention_the_image_are_single_tokens(vocabulary: Vocabulary) -> None:
    circling = {tokenizer().decode([each]).strip().lower() for each in vocabulary.circling.tolist()}
    assert {"wait", "hmm", "alternatively", "等等", "另外"} <= circling
    assert vocabulary.mentions[[token(" image"), token("图片"), token(" the")]].tolist() == [True, True, False]
    assert torch.equal(vocabulary.ends_step[[token(".\n\n"), token(".")]], torch.tensor([True, False]))


@pytest.mark.parametrize("text", [
    "**Final Answer**\n\n", "最终答案：190", "最终答案：\n\n190", '最终答案："190"', "最终答案:\n190",
    "### Final Answer\n",
])  # fmt: skip
def test_a_marker_is_known_with_whatever_follows(text: str) -> None:
    """The tokenizer joins a colon with the line end behind it, and the answer was taken for reasoning."""
    ids = encoded(tokenizer(), text)
    assert any(tuple(ids[: len(marker)]) == marker for marker in natural_markers(tokenizer()))


@pytest.mark.parametrize("text", [
    "= 4\\]**Final Answer**", "so 4)**Final Answer**", "#### Final Answer\n", "***Final Answer***", "**Final Answers**",
    "最终答案:**42**", "最终答案:$4$", "最终答案:\\[4", "最终答案：“42”", "#### 最终答案",
])  # fmt: skip
def test_a_marker_is_known_whatever_the_tokenizer_joins_it_with(text: str) -> None:
    """The governor saw none, and wrote a second one into the answer."""
    natural = [list(marker) for marker in natural_markers(tokenizer())]
    assert first_end(encoded(tokenizer(), text), natural) and len(natural) < 150
    assert not first_end(encoded(tokenizer(), "为了得到最终答案，我们先看图。 A final answer is near: 4"), natural)


def test_headings_are_no_sign_of_a_conclusion() -> None:
    assert set(marker_firsts(tokenizer())) == {token("**"), token("最终")}
