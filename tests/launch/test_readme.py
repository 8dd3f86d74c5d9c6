"""launch/README.md names each launcher, and what is there; its figures of FP8 are the planner's."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qvq_serve.cli import main

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "launch" / "README.md").read_text()


def test_each_launcher_is_named() -> None:
    beside = {"tools.sh", "image_constraints.sh", "compose.cpu.yaml"}  # parts of others
    kinds = ("*.sh", "*.yaml", "*.service", "Dockerfile")
    launchers = {path.name for kind in kinds for path in (ROOT / "launch").glob(kind)} - beside
    assert [name for name in launchers | {"multinode", "ray.sh", "slurm"} if f"[`{name}`]" not in TEXT] == ["ray.sh"]
    assert "[`multinode/ray.sh`]" in TEXT


def test_what_it_leads_to_is_there() -> None:
    named = re.findall(r"`((?:tests|launch)/[\w./-]+)", TEXT)
    assert len(named) >= 8
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_figures_of_fp8_are_the_planners(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint's config.json as the recipe of that page writes it."""
    ignored = re.search(r"ignore=(\[.*\])", TEXT)
    assert ignored
    groups = {"FP8_DYNAMIC": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}}
    quantization: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    quantization |= {"config_groups": groups, "ignore": json.loads(ignored[1])}
    config = json.loads((ROOT / "qvq_serve" / "configs" / "qvq-72b.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    shown: list[dict[str, str]] = []
    for way in (["--quantization", "fp8_per_channel"], ["--model", str(tmp_path)]):
        assert main(["plan", "--gpu", "h200", "--kv-cache-dtype", "fp8", *way]) == 0
        plan = capsys.readouterr().out
        figures = {name: rf"^  {name} +([\d.]+)" for name in ("weights", "vision_encoder")}
        figures["tokens"] = r"^KV cache: (\d+) tokens"
        found = {name: re.search(pattern, plan, re.M) for name, pattern in figures.items()}
        shown.append({name: match[1] for name, match in found.items() if match})
    load, made = shown
    over = ["--profile", "qvq72b_h200x1_fp8", "--model", str(tmp_path)]
    assert main(["plan", "--gpu", "h200", *over, "--quantization", "compressed-tensors"]) == 0
    assert main(["plan", "--gpu", "h200", *over]) == 2
    assert (
        "--quantization fp8_per_channel of qvq72b_h200x1_fp8: the checkpoint is quantised already, with "
        "compressed-tensors; give --quantization compressed-tensors." in capsys.readouterr().err
    )
    assert f"| weights on one H200 | {load['weights']} GiB | {made['weights']} GiB |" in TEXT
    assert (
        f"| its vision encoder | {load['vision_encoder']} GiB, in FP8 as well | {made['vision_encoder']} GiB, BF16 |"
        in TEXT
    )
    assert f" | {int(load['tokens']):,} tokens | {int(made['tokens']):,} tokens |" in TEXT
