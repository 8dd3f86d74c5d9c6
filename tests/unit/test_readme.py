"""The README's flags are --help's, and its hook works. `python -m tests.unit.test_readme` writes the flags."""

import asyncio
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qvq_serve.governor.policy import NAMES, Policy
from qvq_serve.hooks import Answer, Context, Refuse
from qvq_serve.hooks.chain import Chain
from qvq_serve.profile import Profile

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


def test_the_readme_has_the_switches_of_the_governor() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (.+) \|$", README.read_text(), re.MULTILINE)
    switches = [(o.name, str(o.default).lower(), o.metadata["help"]) for o in fields(Policy)]
    assert [row for row in rows if row[0] in NAMES] == switches


def test_the_readme_names_only_files_that_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text())
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []


def test_the_readmes_hook_works() -> None:
    code = re.search(r"```python\n(from qvq_serve.hooks import .*?)```", README.read_text(), re.DOTALL)[1]
    names: dict[str, Any] = {}
    exec(code, names)
    chain = Chain([names["Tenants"](Profile())], 1)
    visitor = Context(SimpleNamespace(max_tokens=None), {"x-tenant": "visitor"})
    asyncio.run(chain.before(visitor))
    assert visitor.request.max_tokens == 512
    with pytest.raises(Refuse, match="X-Tenant is missing"):
        asyncio.run(chain.before(Context(visitor.request)))
    answer = Answer(0, "", "", "answered", {})
    asyncio.run(chain.after(visitor, answer))
    assert answer.qvq == {"images": 0}


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
