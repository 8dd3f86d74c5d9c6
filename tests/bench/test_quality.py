"""Quality: the rules of each data set, its files in its own format, and a suite asked over a real socket."""

import asyncio
import errno
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from aiohttp import web
from PIL import Image
from pyarrow import parquet
from qvq_bench import answers
from qvq_bench.bench import Target
from qvq_bench.cli import main
from qvq_bench.quality import interval, measure
from qvq_bench.suites import Item, items

from qvq_serve.errors import UsageError


def picture(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(("answer", "expected", "right"), [
    ("\\frac{1}{2}", "0.5", True), ("2\\sqrt{2}", "\\sqrt{8}", True), ("1,200", "1200", True),
    ("60^\\circ", "60", True),
    ("12 \\text{ cm}", "12", True), ("x = 5", "5", True), ("(1, 2)", "(1,2)", True), ("3.14", "3.15", False),
    ("\\frac{1}{3}", "0.5", False), ("[0,1)", "[0,1]", False), ("a cat", "12", False), ("", "12", False),
])  # fmt: skip
def test_mathematical_equality(answer: str, expected: str, right: bool) -> None:
    assert answers.mathematical(answer, expected) is right


@pytest.mark.parametrize(("answer", "named"), [
    ("B", "B"), ("(B)", "B"), ("B.", "B"), ("B) blue", "B"), ("blue", "B"), ("Blue ", "B"), ("green", None),
    ("D", None), ("Because", None), ("", None), ("B blue", "B"), ("A blue", None), ("A and C", None),
])  # fmt: skip
def test_an_option_is_named_by_letter_or_text(answer: str, named: str | None) -> None:
    assert answers.letter(answer, ["red", "blue", "yellow"]) == named


def test_an_article_is_no_letter() -> None:
    assert answers.letter("A square", ["A triangle", "A square"]) == "B"
    assert answers.letter("eight", [*"abcdefg", "eight", *"ijk"]) == "H"  # of eleven, the last has no letter
    assert answers.letter("A", ["B", "A"]) == "A"  # points of a drawing: what is asked for is the letter


@pytest.mark.parametrize(("answer", "expected", "options", "right"), [
    ("C", ["C"], ["1", "2", "3"], True), ("3", ["C"], ["1", "2", "3"], True), ("B", ["C"], ["1", "2", "3"], False),
    ("about 4.004", ["4"], [], False), ("4.004", ["4"], [], True), ("4.01", ["4"], [], False),
    ("\\frac{1}{2}", ["0.5"], [], True),
    ("the left ventricle", ["ventricle", "heart"], [], True), ("lung", ["ventricle", "heart"], [], False),
])  # fmt: skip
def test_mmmus_rule(answer: str, expected: list[str], options: list[str], right: bool) -> None:
    assert answers.mmmu(answer, expected, options) is right


@pytest.mark.parametrize(("answer", "expected", "options", "kind", "precision", "right"), [
    ("A", "larger", ["larger", "smaller"], "text", None, True),
    ("largr", "larger", ["larger", "smaller"], "text", None, True),
    ("B", "larger", ["larger", "smaller"], "text", None, False),
    ("7.9", "7", [], "integer", None, True), ("8", "7", [], "integer", None, False),
    ("0.333", "0.33", [], "float", 2.0, True), ("0.34", "0.33", [], "float", 2.0, False),
    ("12 cm", "12", [], "integer", None, True), ("45^\\circ", "45", [], "integer", None, True),
    ("x=5", "5", [], "integer", None, True), ("many", "7", [], "integer", None, False),
    ("[1, 2]", "[1,2]", [], "list", None, True),
])  # fmt: skip
def test_mathvistas_rule(
    answer: str, expected: str, options: list[str], kind: str, precision: float | None, right: bool
) -> None:
    assert answers.mathvista(answer, expected, options, kind, precision) is right


@pytest.mark.parametrize(("answer", "expected", "options", "right"), [
    ("D", "D", ["1", "2", "3", "4"], True), ("4", "D", ["1", "2", "3", "4"], True),
    ("A", "D", ["1", "2", "3", "4"], False), ("\\frac{8}{2}", "D", ["1", "2", "3", "4"], True),
    ("\\frac{8}{2}", "4", [], True), ("5", "4", [], False),
])  # fmt: skip
def test_mathvisions_rule(answer: str, expected: str, options: list[str], right: bool) -> None:
    assert answers.mathvision(answer, expected, options) is right


@pytest.mark.parametrize(("answer", "expected", "tolerances", "right"), [
    ("\\frac{1}{2}", ["$0.5$"], [], True), ("1.02", ["1"], [0.05], True), ("1.2", ["1"], [0.05], False),
    ("2, 1", ["1", "2"], [], True), ("1", ["1", "2"], [None], False), ("1, 2, 3", ["1", "2"], [], False),
    ("(1,2), (3,4)", ["$(3,4)$", "$(1,2)$"], [], True),
    ("150", ["100"], [1.0], False), ("101", ["100"], [1.0], True), ("1.21 \\times 10^{3}", ["1200"], [50], True),
    ("\\frac{1}{3}", ["0.33"], [0.01], True), ("\\sqrt{2}", ["1.41"], [0.01], True), ("a cat", ["1.41"], [0.01], False),
    ("10.4, 3.1", ["3", "10"], [0.1, 0.5], True), ("10.4, 3.2", ["3", "10"], [0.1, 0.5], False),
])  # fmt: skip
def test_olympiadbenchs_rule(answer: str, expected: list[str], tolerances: list[float | None], right: bool) -> None:
    assert answers.olympiadbench(answer, expected, tolerances) is right


def shown(item: Item) -> tuple[int, str]:
    """How many images an item has, and its text."""
    content = item.messages[-1]["content"]
    return sum(part["type"] == "image_url" for part in content), content[-1]["text"]


def test_mmmu_is_read_from_parquet(tmp_path: Path) -> None:
    image = {"bytes": picture(), "path": "1.png"}
    rows = [
        {"id": "validation_Art_7", "question": "What is <image 1>?", "options": "['a hat', \"a cat's\"]", "answer": "B",
         "question_type": "multiple-choice", "image_1": image, "image_2": None},
        {"id": "validation_Art_Theory_12", "question": "How many? <image 1> <image 2>", "options": "[]",
         "answer": "['3', 'three']", "question_type": "open", "image_1": image, "image_2": image},
    ]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "validation-00000-of-00001.parquet")
    first, second = items("mmmu", tmp_path, 0, 10)
    assert (first.id, first.kind, second.kind) == ("validation_Art_7", "Art", "Art_Theory")
    assert shown(first)[0] == 1 and "(A) a hat\n(B) a cat's\n" in shown(first)[1] and "letter" in shown(first)[1]
    assert shown(second)[0] == 2 and "letter" not in shown(second)[1]
    assert first.right("B") and not first.right("A") and second.right("three") and second.right("3.0")


def test_mathvista_is_read_from_its_json_and_image_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(picture())
    rows = {"1": {"question": "How long?", "image": "images/1.jpg", "choices": None, "unit": "cm", "precision": 1.0,
                  "answer": "1.2", "question_type": "free_form", "answer_type": "float"},
            "2": {"question": "Which?", "image": "1.jpg", "choices": ["larger", "smaller"], "unit": None,
                  "precision": None, "answer": "smaller",
                  "question_type": "multi_choice", "answer_type": "text"}}  # fmt: skip
    (tmp_path / "testmini.json").write_text(json.dumps(rows))
    first, second = items("mathvista", tmp_path / "testmini.json", 0, 10)
    assert (
        (first.id, shown(first)[0]) == ("1", 1) and "(Unit: cm)" in shown(first)[1] and "1 decimals" in shown(first)[1]
    )
    assert first.right("1.21") and second.right("B") and second.right("smaller") and not second.right("A")
    assert second.kind == "multi_choice"


@pytest.mark.parametrize(("suite", "split", "other", "row"), [
    ("mathvista", "testmini", "test", {"pid": "1", "choices": None, "precision": None, "question_type": "free_form",
                                       "answer_type": "integer", "unit": None}),
    ("mmmu", "validation", "test", {"id": "validation_Art_7", "options": "[]", "question_type": "open"}),
    ("mathvision", "test", "testmini", {"id": "1", "options": []}),
])  # fmt: skip
def test_of_a_hubs_folder_the_split_with_answers_is_asked(
    tmp_path: Path, suite: str, split: str, other: str, row: dict[str, Any]
) -> None:
    """All splits lie side by side; a test's answers are empty or '?', and broke the judging of the others."""
    row |= {"question": "How many?", "image": {"bytes": picture(), "path": None}}
    for name, answer in ((split, "7"), (other, "8")):
        table = pyarrow.Table.from_pylist([row | {"answer": answer}])
        parquet.write_table(table, tmp_path / f"{name}-00000-of-00001.parquet")
    assert [item.expected for item in items(suite, tmp_path, 0, 10)] == ["7"]
    if suite != "mathvision":
        (tmp_path / f"{split}-00000-of-00001.parquet").unlink()
        no_answer = pyarrow.Table.from_pylist([row | {"answer": "?" if suite == "mmmu" else ""}])
        parquet.write_table(no_answer, tmp_path / "test-00000-of-00001.parquet")
        assert not list(items(suite, tmp_path, 0, 10))


def test_mathvision_is_read_from_json_lines(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "4.jpg").write_bytes(picture())
    row = {"id": "4", "question": "Which one?\n<image1>", "options": ["1", "2"], "image": "images/4.jpg", "answer": "B",
           "level": 2, "subject": "logic"}  # fmt: skip
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n\n")
    (only,) = items("mathvision", tmp_path / "test.jsonl", 0, 10)
    assert only.kind == "level 2" and "<image1>" not in shown(only)[1] and only.right("2") and not only.right("1")


def test_olympiadbench_is_read_from_parquet_without_its_proofs(tmp_path: Path) -> None:
    image = {"bytes": picture(), "path": None}
    common = {"context": "Two tasks.", "unit": "m", "error": "1e-1", "is_multiple_answer": False, "subject": "Physics",
              "language": "English", "image_1": image, "question": "How far?"}  # fmt: skip
    rows = [common | {"id": 5, "final_answer": ["$2.0$"]}, common | {"id": 6, "final_answer": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "OE_MM_physics_en_COMP.parquet")
    (only,) = items("olympiadbench", tmp_path, 0, 10)
    assert (only.id, only.kind, shown(only)[0]) == ("5", "Physics, English", 1) and "unit is m" in shown(only)[1]
    assert only.right("2.05") and not only.right("2.5")


@pytest.mark.parametrize(("suite", "write", "message"), [
    ("mmmu", "nothing", "there is no file that ends with"),
    ("mmmu", '{"question": "?"}', "a row has no 'options'"),
    ("mathvision", '{"id": ', "cannot be read"),
    ("mathvision", '{"id": "4", "question": "?", "options": [], "image": "gone.jpg", "answer": "1"}',
     "gone.jpg is not there"),
])  # fmt: skip
def test_files_that_are_not_a_suites_are_refused_with_their_name(
    suite: str, write: str, message: str, tmp_path: Path
) -> None:
    if write != "nothing":
        (tmp_path / "rows.jsonl").write_text(write)
    with pytest.raises(UsageError, match="--data") as refused:
        list(items(suite, tmp_path, 0, 10))
    assert message in str(refused.value)


def test_the_demos_suites_ask_what_the_image_shows() -> None:
    honest, weak = list(items("demo", None, 40, 20)), list(items("demo-weak", None, 40, 20))
    assert {item.kind for item in honest} == {"invoice", "chart", "table", "count", "box", "written"}
    assert {"exact", "memory", "rambling"} <= {item.kind for item in weak} and len(
        list(items("tutorial", None, 0, 99))
    ) == 6
    again = list(items("demo", None, 40, 20))
    assert [item.messages for item in again] == [item.messages for item in honest]
    remembered = next(item for item in weak if item.kind == "memory")
    assert remembered.right(remembered.expected) and remembered.expected not in ("100", "B, 50", "42")
    blank = next(items("demo-blank", None, 40, 1))
    assert blank.expected == honest[0].expected and blank.messages != honest[0].messages


def test_wilsons_interval_holds_what_it_should() -> None:
    low, high = interval(9, 10)
    assert (round(low, 3), round(high, 3)) == (0.596, 0.982)
    for many in range(1, 100):
        (least, _), (_, most) = interval(0, many), interval(many, many)
        assert 0 <= least < 1e-9 and 1 - 1e-9 < most <= 1


last_asked = threading.Event()
"""Set as the last question of an interrupted suite is asked."""


@contextmanager
def answering(replies: dict[str, dict[str, Any] | int]) -> Iterator[str]:
    """A server that answers by the last word of the question; a number is a status of its own."""

    async def chat(request: web.Request) -> web.Response:
        body = await request.json()
        word = body["messages"][-1]["content"][-1]["text"].split()[-1]
        if word == "slow":
            await asyncio.sleep(30)
        if word == "five":
            last_asked.set()
        made = replies[word]
        if isinstance(made, int):
            return web.json_response({"error": {"message": "no", "code": made}}, status=made)
        assert body["model"] == "some-model" and body["temperature"] == 0
        return web.json_response(made)

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "some-model"}]})

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", chat), web.get("/v1/models", models)])
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(app)
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(runner.cleanup())


def completion(content: str, tokens: int, qvq: dict[str, Any] | None, finish: str = "stop") -> dict[str, Any]:
    choice = {"message": {"content": content, "reasoning": "I see."}, "finish_reason": finish}
    return {"choices": [choice], "usage": {"completion_tokens": tokens}} | ({"qvq": qvq} if qvq else {})


def test_a_suite_is_asked_judged_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    governed = {"ended": "concluded", "reasoning_tokens": 80, "language_switches": 3, "governor": {"found": "loop"}}
    replies: dict[str, dict[str, Any] | int] = {
        "one": completion("\\boxed{1}", 10, {"ended": "answered", "reasoning_tokens": 5, "language_switches": 1}),
        "two": completion("\\boxed{3}", 20, governed), "three": completion("I do not know", 30, None, "length"),
        "four": 503,
    }  # fmt: skip
    asked = [
        Item(word, "odd" if at % 2 else "even", [{"role": "user", "content": [{"type": "text", "text": f"a {word}"}]}],
             str(at), lambda answer, at=at: answer == str(at))
        for at, word in enumerate(replies, 1)
    ]  # fmt: skip
    out = tmp_path / "quality.json"
    with answering(replies) as url:
        code = asyncio.run(measure(Target(url), "demo", asked, {"temperature": 0}, 2, out, ["quality"], False))
    told = json.loads(capsys.readouterr().out)
    assert code == 1 and (told["count"], told["right"], told["answered"]) == (4, 1, 0.5)
    assert told["by_kind"]["odd"]["right"] == 1 and told["by_kind"]["even"]["count"] == 2
    assert told["ended"] == {"answered": 1, "concluded": 1, "length": 1, "error": 1} and told["governor"] == {"loop": 1}
    assert (told["output_tokens"], told["reasoning_tokens"], told["language_switches"]) == (15.0, 21.25, 1.0)
    assert told["errors"] == {"no": 1}
    written = json.loads(out.read_text())
    assert [each["answer"] for each in written["answers"]] == ["1", "3", None, None]
    assert written["kind"] == "quality" and written["summary"]["right"] == 1


def test_an_interruption_leaves_each_answer_to_its_own_question(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers behind one that was still waited for were judged by other questions' rules."""
    words = ["one", "two", "slow", "four", "five"]
    replies: dict[str, dict[str, Any] | int] = {word: completion(f"\\boxed{{{word}}}", 1, None) for word in words}
    asked = [
        Item(word, "all", [{"role": "user", "content": [{"type": "text", "text": f"a {word}"}]}], word, word.__eq__)
        for word in words
    ]

    async def interrupted(url: str) -> int:
        out = tmp_path / "quality.json"
        task = asyncio.create_task(measure(Target(url), "demo", asked, {"temperature": 0}, 2, out, [], False))
        await asyncio.to_thread(last_asked.wait, 30)
        await asyncio.sleep(0.5)  # for the fourth answer's way back
        task.cancel()
        return await task

    with answering(replies) as url:
        assert asyncio.run(interrupted(url)) == 130
    told = json.loads(capsys.readouterr().out)
    assert (told["count"], told["right"]) == (4, 4)


def test_a_rule_that_breaks_and_a_full_disk_lose_no_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["one", "two"]
    rules = {"one": "one".__eq__, "two": lambda answer: bool(float(answer))}
    asked = [
        Item(word, "all", [{"role": "user", "content": [{"type": "text", "text": f"a {word}"}]}], word, rules[word])
        for word in words
    ]
    monkeypatch.setattr(Path, "replace", full_disk)
    with (
        answering({word: completion(f"\\boxed{{{word}}}", 1, None) for word in words}) as url,
        pytest.raises(UsageError),
    ):
        asyncio.run(measure(Target(url), "demo", asked, {"temperature": 0}, 2, tmp_path / "out.json", [], False))
    told = json.loads(capsys.readouterr().out)
    assert (told["count"], told["right"]) == (2, 1)
    assert list(told["errors"]) == [
        "item two could not be judged: ValueError: could not convert string to float: 'two'"
    ]
    assert not list(tmp_path.iterdir())


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("answer", ["nan", "inf", "-infinity"])
def test_what_is_no_number_is_wrong_and_harms_nothing(answer: str) -> None:
    assert answers.mathvista(answer, "3", [], "integer", None) is False


@pytest.mark.parametrize(("arguments", "message"), [
    (["--suite", "mmmmu"], "--suite mmmmu: unknown. Did you mean 'mmmu'?"),
    (["--suite", "mathvista"], "--suite mathvista: --data names its files"),
    (["--limit", "0"], "--limit 0: must be 1 or more"),
    (["--body", "[1]"], "--body [1]: must be an object"),
    (["--body", "{"], "--body {: is no JSON"),
    (["--url", "http://127.0.0.1:9", "--limit", "1"], "no server answers there"),
])  # fmt: skip
def test_what_cannot_be_asked_is_said_in_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quality", *arguments]) == 2
    assert message in capsys.readouterr().err
