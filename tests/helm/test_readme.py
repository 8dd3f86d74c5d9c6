"""The chart's README: a paragraph for each alert, and the values as they are. `python -m tests.helm.test_readme` writes
the table."""

import json
import re
from typing import Any

import yaml

from tests.helm.chart import CHART, SCENARIOS, needs_helm
from tests.helm.queries import rules

README = CHART / "README.md"
TABLE = re.compile(r"(<!-- values:.*?-->\n).*?(<!-- /values -->)", re.DOTALL)


def explained() -> list[tuple[str, str, str]]:
    """(key, default, comment) of each value, in their order; the comment is what stands above it."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    found, comment, above = [], [], ""
    for line in (CHART / "values.yaml").read_text().splitlines():
        if line.strip().startswith("#"):
            comment.append(line.strip().removeprefix("#").strip())
        elif match := re.match(r"(  )?(\w+):(.*)", line):
            inner, name, rest = match.groups()
            if not inner and not rest:
                above, default = name, values[name]
                if isinstance(default, dict):
                    continue  # its keys follow, each with a comment of its own
            key = f"{above}.{name}" if inner else name
            default = values[above][name] if inner else values[name]
            found.append((key, json.dumps(default), " ".join(comment)))
            comment = []
    return found


def leaves(schema: dict[str, Any], above: str = "") -> list[str]:
    """The keys of the schema to the second level."""
    found = []
    for name, inner in schema["properties"].items():
        nested = not above and inner.get("additionalProperties") is False and name not in ("settings", "plan")
        found += leaves(inner, f"{name}.") if nested else [above + name]
    return found


def table() -> str:
    rows = [f"| `{key}` | `{default}` | {comment.replace('|', ',')} |" for key, default, comment in explained()]
    return "\n".join(["| value | default | |", "| --- | --- | --- |", *rows, ""])


def written(text: str) -> str:
    return TABLE.sub(lambda block: block[1] + table() + block[2], text)


def test_the_readme_has_the_values_as_they_are() -> None:
    text = README.read_text()
    assert TABLE.search(text)
    assert written(text) == text, "python -m tests.helm.test_readme writes them"


def test_each_value_is_explained_and_in_the_schema() -> None:
    assert [key for key, _, comment in explained() if not comment] == []
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert sorted(key for key, _, _ in explained()) == sorted(set(leaves(schema)) - {"global"})


@needs_helm
def test_each_alert_leads_to_its_paragraph_which_says_what_it_means_and_what_to_do() -> None:
    sections = dict(re.findall(r"^### (Qvq\w+)\n\n(.*?)\n(?=\n#|\Z)", README.read_text(), re.DOTALL | re.MULTILINE))
    assert list(sections) == [rule["alert"] for rule in rules()]
    for rule in rules():
        assert rule["annotations"]["runbook_url"] == f"helm/qvq-serve/README.md#{rule['alert'].lower()}"
        assert len(sections[rule["alert"]]) > 200
        assert "**Do:**" in sections[rule["alert"]]


def test_each_scenario_is_named() -> None:
    text = README.read_text()
    assert [name for name in SCENARIOS if f"ci/{name}-values.yaml" not in text] == []


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
