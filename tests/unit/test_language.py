"""Scripts and switches between them."""

import pytest

from qvq_serve.hooks.language import languages, switches


def test_letters_are_counted_by_script_without_digits_and_commands() -> None:
    assert languages("So 12 \\frac{3}{4} 你好") == {"Latin": 0.5, "Han": 0.5}
    assert languages("12 + 3 = 15") == {}
    assert languages("5 µm, 𝑥 ∈ ℝ, Ａ, 3 º") == {"Latin": 0.833, "Greek": 0.167}
    assert list(languages("мир и хлеб, so")) == ["Cyrillic", "Latin"]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("This is fine. So is this.", 0),
        ("This is fine. 这个也很好。 And English again.", 2),
        ("这个图形的面积是 x。设 AB = 3。所以答案是三。", 0),  # a formula is no change of language
        ("これはペンです。東京都庁舎は新宿にある。", 0),  # Japanese writes Han as well
        ("", 0),
    ],
)
def test_a_switch_is_a_sentence_in_another_script(text: str, number: int) -> None:
    assert switches(text) == number
