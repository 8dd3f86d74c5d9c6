"""The README's flags are --help's. `python -m tests.unit.test_readme` writes them."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"(<!-- flags:.*?-->\n).*?(<!-- /flags -->)", re.DOTALL)


def flags() -> str:
    """`qvq-serve serve --help`, 118 columns wide, as a block of Markdown."""
    command = [sys.executable, "-m", "qvq_serve", "serve", "--help"]
    environ = os.environ | {"COLUMNS": "118"}
    return "```\n" + subprocess.run(command, capture_output=True, text=True, check=True, env=environ).stdout + "```\n"


def written(text: str) -> str:
    """The README with the flags of the program as it is."""
    return BLOCK.sub(lambda block: block[1] + flags() + block[2], text)


def test_the_readme_has_the_flags_of_the_program() -> None:
    text = README.read_text()
    assert BLOCK.search(text)
    assert written(text) == text, "python -m tests.unit.test_readme writes them"


def test_the_readme_names_only_files_that_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text())
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
