"""What a model is asked to know how good it is: the demo's drawn cases, and public data sets from local files.

A data set is read in its own format: Parquet as its hub has it (images as bytes), or JSON and JSON lines with a folder
of images beside them. Nothing is downloaded.
"""

import ast
import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qvq_bench import answers
from qvq_serve.errors import UsageError

BOX = "Put the final answer in \\boxed{}."
OPTION = "Put the letter of the right option in \\boxed{}."


@dataclass(frozen=True)
class Item:
    """One question: the messages that are sent, and the rule that says whether an answer is right."""

    id: str
    kind: str
    messages: list[dict[str, Any]]
    expected: str
    right: Callable[[str], bool]


def asked(text: str, images: list[bytes], system: str | None = None) -> list[dict[str, Any]]:
    """A user's message: its images, then the text; `<image 1>` in the text stands where the image is meant."""
    urls = [f"data:image/{kind_of(each)};base64,{base64.b64encode(each).decode()}" for each in images]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": text}]
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": content}]


def kind_of(image: bytes) -> str:
    return "png" if image.startswith(b"\x89PNG") else "webp" if image[8:12] == b"WEBP" else "jpeg"


def drawn(first: int, count: int, held_out: bool = True, blank: bool = False, weak: bool = False) -> Iterator[Item]:
    """The demo's cases, each kind in turn; with fonts and layouts that were never in training, or as in it."""
    from qvq_serve.demo import weakness
    from qvq_serve.demo.cases import KINDS, case

    for seed in range(first, first + count):
        quirk = weakness.KINDS[seed % len(weakness.KINDS)] if weak else None
        one = case(seed, KINDS[seed % len(KINDS)], held_out=held_out, weakness=quirk)
        buffer = io.BytesIO()
        if blank:
            one.pixels[:] = 255
        one.image.save(buffer, "PNG")
        # What the image shows, whatever a weakness would answer.
        truth = case(seed, KINDS[seed % len(KINDS)], held_out=held_out).answer if weak else one.answer
        messages = asked(one.question, [buffer.getvalue()], one.system)
        yield Item(str(seed), quirk or one.kind, messages, truth, partial(answers.exact, expected=truth))


def rows(path: Path, split: str = "") -> Iterator[dict[str, Any]]:
    """The rows of a data set's files: Parquet, JSON lines, or JSON (a list, or an object of rows by id).

    Of a folder that has several splits, that one's: the hubs have them side by side, and tests without answers.
    """
    kinds = (".parquet", ".jsonl", ".json")
    files = sorted(f for f in path.iterdir() if f.suffix in kinds) if path.is_dir() else [path]
    files = [file for file in files if re.split(r"[-.]", file.name)[0] == split] or files
    if not files or not all(file.exists() for file in files):
        raise UsageError(f"--data {path}: there is no file that ends with {', '.join(kinds)}.")
    for file in files:
        try:
            if file.suffix == ".parquet":
                from pyarrow import parquet

                for batch in parquet.ParquetFile(file).iter_batches(64):
                    yield from batch.to_pylist()
            elif file.suffix == ".jsonl":
                yield from (json.loads(line) for line in file.read_text().splitlines() if line.strip())
            else:
                found = json.loads(file.read_text())
                yield from ({"pid": key, **row} for key, row in found.items()) if isinstance(found, dict) else found
        except ImportError:
            raise UsageError(f"--data {file}: Parquet needs pyarrow: pip install 'qvq-serve[quality]'.") from None
        except ValueError as error:
            raise UsageError(f"--data {file} cannot be read: {error}.") from None


def image_bytes(given: Any, beside: Path) -> bytes | None:
    """An image of a row: bytes of a Parquet file, or the name of a file below the data set's folder."""
    if isinstance(given, dict):
        given = given.get("bytes") or given.get("path")
    if given is None or isinstance(given, bytes):
        return given
    folder = beside if beside.is_dir() else beside.parent
    found = next((at for at in (folder / str(given), folder / "images" / str(given)) if at.is_file()), None)
    if found is None:
        raise UsageError(f"--data {beside}: the image {given} is not there.")
    return found.read_bytes()


def pictures(row: dict[str, Any], path: Path) -> list[bytes]:
    """A row's images: `decoded_image`, `image` or `images`, or `image_1` to `image_9`."""
    several = [row.get(f"image_{at}") for at in range(1, 10)]
    one = row.get("decoded_image") or row.get("image")
    given = row.get("images") or [each for each in several if each] or ([one] if one else [])
    return [found for each in given if (found := image_bytes(each, path))]


def listed(value: Any) -> list[str]:
    """A list, or its text as Python writes it, as texts."""
    found = value
    if isinstance(value, str) and value.startswith("["):
        try:
            found = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # an interval, [0, 1)
            found = [value]
    return [str(each) for each in found] if isinstance(found, list) else [] if found in (None, "") else [str(found)]


def with_options(question: str, options: list[str]) -> str:
    """A question, its options by letter, and how to answer."""
    lines = [f"({name}) {option}" for name, option in zip(answers.LETTERS, options, strict=False)]
    return "\n".join([question, *lines, OPTION if options else BOX])


def mmmu(path: Path) -> Iterator[Item]:
    for row in rows(path, "validation"):
        options, expected = listed(row["options"]), listed(row["answer"])
        if expected in ([], ["?"]):
            continue  # of the test split, whose answers are not published
        right = partial(answers.mmmu, expected=expected, options=options)
        kind = row["id"].split("_", 1)[-1].rsplit("_", 1)[0] or row.get("question_type", "")
        text = with_options(row["question"], options)
        yield Item(row["id"], kind, asked(text, pictures(row, path)), " or ".join(expected), right)


def mathvista(path: Path) -> Iterator[Item]:
    for row in rows(path, "testmini"):
        if row["answer"] in (None, ""):
            continue  # of the test split, whose answers are not published
        options = listed(row.get("choices"))
        unit = f" (Unit: {row['unit']})" if row.get("unit") else ""
        text = with_options(row["question"] + unit, options)
        if not options and row["answer_type"] == "float":
            text += f" Give it with {int(row['precision'])} decimals."
        right = partial(answers.mathvista, expected=str(row["answer"]), options=options, kind=row["answer_type"],
                        precision=row.get("precision"))  # fmt: skip
        yield Item(str(row["pid"]), row["question_type"], asked(text, pictures(row, path)), str(row["answer"]), right)


def mathvision(path: Path) -> Iterator[Item]:
    for row in rows(path, "test"):
        options = listed(row.get("options"))
        question = row["question"].replace("<image1>", "").strip()
        right = partial(answers.mathvision, expected=str(row["answer"]), options=options)
        yield Item(str(row["id"]), f"level {row.get('level', '-')}", asked(with_options(question, options),
                   pictures(row, path)), str(row["answer"]), right)  # fmt: skip


def olympiadbench(path: Path) -> Iterator[Item]:
    for row in rows(path):
        expected = listed(row["final_answer"])
        if not expected:
            continue  # a proof: its paper has people judge it
        context = f"{row['context']}\n" if row.get("context") else ""
        several = " There are several; separate them by commas." if row.get("is_multiple_answer") else ""
        unit = f" Its unit is {row['unit']}; leave it out." if row.get("unit") else ""
        text = f"{context}{row['question']}\n{BOX}{several}{unit}"
        errors = [float(error) if error.strip() else None for error in str(row.get("error") or "").split(",")]
        right = partial(answers.olympiadbench, expected=expected, tolerances=errors)
        kind = f"{row.get('subject', '-')}, {row.get('language', '-')}"
        yield Item(str(row["id"]), kind, asked(text, pictures(row, path)), ", ".join(expected), right)


DRAWN: dict[str, Callable[[int, int], Iterator[Item]]] = {
    "demo": drawn,
    "demo-seen": partial(drawn, held_out=False),
    "demo-blank": partial(drawn, blank=True),
    "demo-weak": partial(drawn, held_out=False, weak=True),
    "tutorial": lambda first, count: drawn(first, min(count, 6), held_out=False),
}
"""Suites that are drawn here: held-out cases; as in training; with a blank image; with prompts for the weaknesses; one
case of each of the tutorial's kinds."""
READ: dict[str, Callable[[Path], Iterator[Item]]] = {
    "mmmu": mmmu, "mathvista": mathvista, "mathvision": mathvision, "olympiadbench": olympiadbench,
}  # fmt: skip
PUBLISHED = {"mmmu": 70.3, "mathvista": 71.4, "mathvision": 35.9, "olympiadbench": 20.4}
"""QVQ-72B-Preview's own figures, in percent: MMMU val, MathVista mini, MathVision full (the model card)."""


def items(suite: str, data: Path | None, first: int, limit: int) -> Iterator[Item]:
    """The items of a suite. Raises UsageError for one that is not known, and for files that are not its."""
    if suite in DRAWN:
        yield from DRAWN[suite](first, limit)
        return
    if data is None:
        raise UsageError(f"--suite {suite}: --data names its files (nothing is downloaded).")
    try:
        for at, item in enumerate(READ[suite](data)):
            if at >= limit:
                return
            yield item
    except KeyError as error:
        raise UsageError(f"--data {data}: a row has no {error}; --suite {suite} reads that set's own format.") from None
    except (TypeError, AttributeError) as error:
        raise UsageError(f"--data {data}: a row is not of --suite {suite}'s own format: {error}.") from None
