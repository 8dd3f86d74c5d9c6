"""The README's flags are --help's, its hook works, and the links of all pages lead somewhere.

`python -m tests.unit.test_readme` writes the flags.
"""

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
PAGES = [
    "README.md",
    "benchmarks/LOG.md",
    "benchmarks/MEASURED.md",
    "benchmarks/README.md",
    "helm/qvq-serve/README.md",
    "launch/README.md",
    "launch/multinode/README.md",
]
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


def headings(page: Path) -> set[str]:
    """What a link may name behind its `#`, as GitHub makes them of headings without markup."""
    lines = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", line).strip().lower().replace(" ", "-") for line in lines}


@pytest.mark.parametrize("name", PAGES)
def test_each_link_leads_somewhere(name: str) -> None:
    page = README.parent / name
    links = re.findall(r"\]\(([^):#]*)(?:#([^)]+))?\)", page.read_text())
    lost = [
        (to, at)
        for to, at in links
        if not (there := page.parent / to if to else page).exists() or (at and at not in headings(there))
    ]
    assert links and lost == []


def test_the_readmes_hook_works() -> None:
    code = re.search(r"```python\n(from qvq_serve.hooks import .*?)```", README.read_text(), re.DOTALL)[1]
    names: dict[str, Any] = {}
    exec(code, names)
    chain = Chain([names["Tenants"](Profile())], 1)
    for asked, got in ((None, 512), (8000, 512), (9, 9)):
        visitor = Context(SimpleNamespace(max_tokens=600, max_completion_tokens=asked), {"x-tenant": "visitor"})
        asyncio.run(chain.before(visitor))
        assert visitor.request.max_completion_tokens == got
    with pytest.raises(Refuse, match="X-Tenant is missing"):
        asyncio.run(chain.before(Context(visitor.request)))
    answer = Answer(0, "", "", "answered", {})
    asyncio.run(chain.after(visitor, answer))
    assert answer.qvq == {"images": 0}


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
