"""The boxed answer, and what stands for an answer where there is none."""

import pytest

from qvq_serve.hooks.answer import boxed_answer, boxes, conclusion, plain


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (r"\boxed{-29}", "-29"),
        (r"$\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", "{1, 2}"),
        (r"\boxed{\text{(A)}}", "(A)"),
        (r"\boxed{12\ \text{cm}^2}", "12 cm^2"),
        (r"\boxed{\$1{,}200}", "$1,200"),
        (r"\boxed{100\$}", "100$"),
        (r"\boxed{50\%}", "50%"),
        (r"\boxed{\text{a \textbf{bold} word}}", "a bold word"),
        (r"either \boxed{3} or \boxed{5}", "3, 5"),
        (r"\boxed{7}, that is \boxed{7}", "7"),
        (r"\boxed{outer \boxed{inner}}", r"outer \boxed{inner}"),
        (r"\boxed{四十二}", "四十二"),
        (r"\boxed{cut off", None),
        ("no box at all", None),
    ],
)
def test_the_answer_is_what_the_boxes_hold(content: str, answer: str | None) -> None:
    assert boxed_answer(content) == answer


def test_boxes_of_the_answer_go_before_those_of_the_reasoning_of_which_the_last_counts() -> None:
    assert boxed_answer("it is 5", r"first \boxed{3}, no, \boxed{4}") == "4"
    assert boxed_answer(r"\boxed{5}", r"\boxed{4}") == "5"


def test_a_text_without_a_marker_is_concluded_by_its_last_box_or_paragraph() -> None:
    assert conclusion("a \\boxed{1}\n\nb \\boxed{2} c\n\nd") == r"\boxed{2}"
    assert conclusion("First.\n\nSo it is blue.\n\n") == "So it is blue."
    assert conclusion("") == ""


def test_a_cut_box_does_not_hide_a_whole_one() -> None:
    assert boxes(r"\boxed{1} then \boxed{2") == ["1"]


def test_wrappers_in_wrappers_are_taken_off_a_few_deep() -> None:
    """Thousands of them, which a grammar can make the model write, stopped all streams for seconds."""
    assert plain("\\text{" * 8 + "x" + "}" * 8) == "x"
    assert plain("\\text{" * 20 + "x" + "}" * 20) == "\\text{" * 12 + "x" + "}" * 12
