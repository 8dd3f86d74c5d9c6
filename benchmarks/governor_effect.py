"""What each switch of the governor does to answers of a model that loops, mixes languages and rambles: the demo.

    qvq-serve --demo --governor on --governor-policy POLICY      POLICY as below, so that each switch can be asked for
    python -m benchmarks.governor_effect RESULT.json [--url URL] [--limit 500] [--only NAME…]

The cases of `qvq-bench quality --suite demo-weak`, greedy, at most --max-tokens each. The variants take turns, --block
cases at a time, so that all meet the same machine.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from qvq_bench import result
from qvq_bench.bench import Target
from qvq_bench.quality import Judged, ask_all, judge, summarise
from qvq_bench.suites import DRAWN

POLICY = "language,reasoning_language=4,circling=4,circling_after=64,look=2,look_after=128,look_entropy=1,sure=0.5"
NONE = {"loop": False, "budget": False, "language": False, "reasoning_language": 0, "circling": 0, "look": 0, "sure": 0}
VARIANTS: dict[str, Any] = {
    "off": False,
    "loop": NONE | {"loop": True},
    "budget": NONE | {"budget": True},
    "loop and budget": NONE | {"loop": True, "budget": True},
    "language": NONE | {"language": True},
    "reasoning_language": NONE | {"reasoning_language": 4},
    "circling": NONE | {"circling": 4},
    "look": NONE | {"look": 2},
    "sure": NONE | {"sure": 0.5},
    "everything": {},
}


async def measure(
    target: Target, names: list[str], limit: int, users: int, max_tokens: int, block_size: int = 50
) -> AsyncIterator[dict[str, Any]]:
    """Figures of each variant over the cases so far, after each block."""
    items = list(DRAWN["demo-weak"](0, limit))
    judged: dict[str, list[Judged]] = {name: [] for name in names}
    seconds = dict.fromkeys(names, 0.0)
    for first in range(0, limit, block_size):
        block = items[first : first + block_size]
        for name in names:
            body = {"temperature": 0, "max_tokens": max_tokens, "governor": VARIANTS[name]}
            began = time.monotonic()
            found = await ask_all(target, block, body, users, show=False)
            seconds[name] += time.monotonic() - began
            if len(found) < len(block):  # Ctrl-C, which ask_all takes for its end
                raise KeyboardInterrupt
            judge(found, block)
            judged[name] += found.values()
        yield {name: summarise(judged[name], seconds[name]) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--block", type=int, default=50)
    parser.add_argument("--max-tokens", type=int, default=1_200)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    options = parser.parse_args()
    asyncio.run(run(options))


async def run(options: argparse.Namespace) -> None:
    """Measures, and writes the result after each block."""
    target, found = Target(options.url, timeout=600), dict[str, Any]()
    asked = (options.only, options.limit, options.users, options.max_tokens, options.block)
    made = result.header("governor_effect", []) | {
        "command": ["python", "-m", "benchmarks.governor_effect", *sys.argv[1:]],
        "users": options.users, "max_tokens": options.max_tokens, "policy": POLICY,
    }  # fmt: skip
    async for found in measure(target, *asked):
        made["variants"] = {name: {"governor": VARIANTS[name], **row} for name, row in found.items()}
        options.out.write_text(json.dumps(made, indent=1) + "\n")
    for name, row in found.items():
        print(
            f"{name:20} right {row['accuracy']:6.1%}  answered {row['answered']:6.1%}"
            f"  {row['output_tokens']:5.0f} tokens  {row['answers_per_second']:6.2f} answers/s"
            f"  {row['right_per_second']:6.2f} right/s  {row['language_switches']:.1f} switches  {row['ended']}"
        )


if __name__ == "__main__":
    main()
