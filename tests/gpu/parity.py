"""Greedy tokens with and without us, and our memory metrics against the driver's.

    python -m tests.gpu.parity RESULT.json QVQ-SERVE'S ARGUMENTS…

One card holds one server after the other: ours, then vLLM's own with the same engine flags. Each is asked the same
texts and images, one at a time, since vLLM's sums depend on who shares a batch. `--demo` does without a card, and
then nothing is said of memory. Exit code 1 where a case does not hold.
"""

import datetime
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.check_start import samples
from benchmarks.stack_ratio import BARE, bare_command, picture
from qvq_serve.gpu import GIB, Gpu, used_bytes, visible_gpus
from tests.gpu.over_long_lists import start

PORT = 8773
URL = f"http://127.0.0.1:{PORT}"
TOKENS = 64
TEXTS = ("How much is 12 and 29?", "Count from one to twenty.", "写一首关于图书馆的诗。", "Which shape has no corners?")
SAMPLING = {"temperature": 0, "repetition_penalty": 1.0, "max_tokens": TOKENS, "ignore_eos": True,
            "return_token_ids": True, "repetition_detection": {"max_pattern_size": 0}}  # fmt: skip
POLL_S = 7
"""More than the five seconds after which the metrics are read again."""


def answers() -> dict[str, list[list[int]]]:
    """Prompt and answer of each question, as token ids."""
    found = {}
    for number, text in enumerate((*TEXTS, *TEXTS, "What is this?", "这是什么?")):
        seen = number >= len(TEXTS)  # the texts alone first, then with an image
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if seen:
            content.insert(0, {"type": "image_url", "image_url": {"url": picture(number)}})
        messages = [{"role": "system", "content": "You are helpful."}, {"role": "user", "content": content}]
        got = httpx.post(f"{URL}/v1/chat/completions", json={"messages": messages} | SAMPLING, timeout=300)
        made = got.raise_for_status().json()
        name = f"{text} about image {number}" if seen else text
        found[name] = [made["prompt_token_ids"], made["choices"][0]["token_ids"]]
    return found


def memory(gpu: Gpu) -> tuple[int, dict[str, float]]:
    """(bytes in use on a card by the driver, our metrics of it by use)."""
    text = httpx.get(f"{URL}/metrics", timeout=60).text
    measured = {use: value for (card, source, use), value in samples(text, "qvq_memory_bytes").items()
                if (card, source) == (str(gpu.index), "measured")}  # fmt: skip
    headroom = samples(text, "qvq_memory_headroom_bytes")
    return used_bytes([gpu])[0], measured | {"headroom": headroom[(str(gpu.index),)]}


def memory_cases(gpu: Gpu) -> list[tuple[str, bool, Any]]:
    """The metrics are the driver's figures; they follow another process's memory; their parts are within the whole."""
    import torch

    time.sleep(POLL_S)
    used, metric = memory(gpu)
    seen = {use: round(value / GIB, 3) for use, value in (metric | {"driver": used}).items()}
    same = abs(metric["card"] - used) < GIB / 16 and abs(metric["headroom"] - (gpu.memory_bytes - used)) < GIB / 16
    within = metric["allocated"] <= metric["reserved"] <= used
    parts = metric["weights"] + metric["kv_cache"] <= metric["allocated"] * 1.02
    held = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    time.sleep(POLL_S)
    grown, later = memory(gpu)
    more = {"driver": round((grown - used) / GIB, 3), "metric": round((later["card"] - metric["card"]) / GIB, 3)}
    follows = grown - used >= held.nbytes and abs(later["card"] - grown) < GIB / 16
    del held
    torch.cuda.empty_cache()  # the next server needs the card
    return [
        ("the metric and the driver say the same", same, seen),
        ("allocated within reserved within used", within and parts, seen),
        ("another process's GiB is seen at the next poll", follows, more),
    ]


def main() -> int:
    out, arguments = Path(sys.argv[1]), sys.argv[2:]
    ours = [sys.executable, "-m", "qvq_serve", "--port", str(PORT), *arguments]
    bare, gpus = bare_command(arguments, PORT), visible_gpus()[:1]
    rows: list[dict[str, Any]] = []

    def note(case: str, held: bool, seen: Any) -> None:
        rows.append({"case": case, "held": held, "seen": seen, "date": datetime.date.today().isoformat()})
        print(rows[-1], flush=True)
        command = f"qvq-serve {' '.join(arguments)}"
        found = {"command": command, "cards": [gpu.name for gpu in gpus], "rows": rows}
        out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")

    said: list[dict[str, list[list[int]]]] = []
    for command, environ in ((ours, {}), (bare, BARE)):
        process = start(command, URL, Path(tempfile.mkdtemp()) / "server.log", os.environ | environ)
        said.append(answers())
        if not environ:
            for case in (case for gpu in gpus for case in memory_cases(gpu)):
                note(*case)
        process.terminate()
        process.wait(120)
    for question, (prompt, answer) in said[0].items():
        there = said[1][question]
        note(question, [prompt, answer] == there, {"prompt": len(prompt), "answer": answer[:8], "other": there[1][:8]})
    different = len({tuple(answer) for _, answer in said[0].values()})
    note("the answers are not all the same", different > len(said[0]) // 2, different)
    return int(not all(row["held"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
