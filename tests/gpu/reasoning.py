"""Budget, grammars and loops on vLLM's V2 runner, which only a GPU runs: the cases of tests/engine/test_reasoning.py.

    python tests/gpu/reasoning.py RESULT.json PORT COMMAND…

The weights are made up, the vocabulary is Qwen's.
"""

import datetime
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx

from tests.gpu.over_long_lists import start

SCHEMA = {"type": "object", "properties": {"total": {"type": "integer"}}, "required": ["total"],
          "additionalProperties": False}  # fmt: skip
GRAMMARS: dict[str, tuple[dict[str, Any], str]] = {
    "json": ({"response_format": {"type": "json_schema", "json_schema": {"name": "t", "schema": SCHEMA}}},
             r'\{\s*"total"\s*:\s*-?\d+\s*\}'),
    "choice": ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
    "regex": ({"structured_outputs": {"regex": "[0-9]{3}"}}, "[0-9]{3}"),
}  # fmt: skip


def main() -> None:
    out, port, command = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    url = f"http://127.0.0.1:{port}"
    process = start(command, url, Path(tempfile.mkdtemp()) / "server.log")
    rows: list[dict[str, Any]] = []

    def ask(**body: Any) -> dict[str, Any]:
        request = {"messages": [{"role": "user", "content": "How much?"}], "temperature": 0, "ignore_eos": True} | body
        got = httpx.post(f"{url}/v1/chat/completions", json=request, timeout=120)
        made: dict[str, Any] = got.json()
        return made

    def note(case: str, passed: bool, seen: Any) -> None:
        rows.append({"case": case, "passed": passed, "seen": seen, "date": datetime.date.today().isoformat()})
        print(rows[-1], flush=True)
        out.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")

    for budget in (1, 20, 100):
        made = ask(max_tokens=budget + 50, thinking_token_budget=budget, repetition_detection={"max_pattern_size": 0})
        content, qvq = made["choices"][0]["message"]["content"], made["qvq"]
        passed = qvq["reasoning_tokens"] == budget and "Final Answer" not in content
        note(f"a budget of {budget}", passed, qvq)
    for name, (form, pattern) in GRAMMARS.items():
        for budget in ({}, {"thinking_token_budget": 30}):
            made = ask(max_tokens=240, ignore_eos=False, **form, **budget)
            message, qvq = made["choices"][0]["message"], made["qvq"]
            expected = budget.get("thinking_token_budget", 180)
            passed = bool(re.fullmatch(pattern, message["content"])) and qvq["reasoning_tokens"] == expected
            note(f"a grammar, {name}, {budget or 'default budget'}", passed, {**qvq, "content": message["content"]})
    eos = {"logit_bias": {"151645": 100}}
    made = ask(max_tokens=8, ignore_eos=False, **eos)
    note("the end of the turn made likeliest", made["usage"]["completion_tokens"] == 1, made["usage"])
    made = ask(max_tokens=240, ignore_eos=False, **eos, **GRAMMARS["choice"][0])
    content = made["choices"][0]["message"]["content"]
    note("the same with a grammar", content in ("yes", "no"), made["qvq"])
    made = ask(max_tokens=400)
    note("a loop of the made-up weights, by the default", made["qvq"]["ended"] in ("looped", "length"), made["qvq"])
    process.terminate()
    note("exit code after SIGTERM", process.wait(60) == 0, process.returncode)


if __name__ == "__main__":
    main()
