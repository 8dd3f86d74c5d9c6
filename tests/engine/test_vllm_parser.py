"""--dry-run against vLLM's own parser: the printed line means what a start gives."""

import os
import shlex
import subprocess
import sys

import pytest
from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args

from qvq_serve.engine import parse
from qvq_serve.errors import UsageError


def test_the_printed_line_gives_vllm_the_same_namespace() -> None:
    command = [sys.executable, "-m", "qvq_serve", "--tp", "4", "--max-images", "2", "--quantization", "fp8_per_channel",
               "--dry-run", "--", "--max-num-seqs", "64", "--no-enable-prefix-caching"]  # fmt: skip
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    arguments = parse(shlex.split(printed)[2:])
    validate_parsed_serve_args(arguments)
    assert arguments.model_tag.endswith("Qwen/QVQ-72B-Preview")
    assert (arguments.tensor_parallel_size, arguments.max_model_len, arguments.max_num_seqs) == (4, 32768, 64)
    assert arguments.quantization == "fp8_per_channel"
    assert arguments.limit_mm_per_prompt == {"image": 2, "video": 0}
    assert arguments.mm_processor_kwargs == {"size": {"shortest_edge": 200704, "longest_edge": 1003520}}
    assert arguments.default_chat_template_kwargs["system_prompt"].endswith("think step-by-step.")
    assert arguments.served_model_name == ["Qwen/QVQ-72B-Preview"]
    assert arguments.enable_prefix_caching is False
    assert os.path.isfile(arguments.chat_template)


def test_a_flag_that_vllm_does_not_know_gets_its_nearest_one() -> None:
    with pytest.raises(UsageError, match=r"unrecognized arguments: --max-num-sequences.*Did you mean '--max-num-seqs'"):
        parse(["model", "--max-num-sequences", "4"])


def test_a_flag_cut_short_is_refused() -> None:
    """Python's parsers take any unambiguous beginning of a flag: --tp's value would be set after the dashes."""
    with pytest.raises(UsageError, match=r"unrecognized arguments: --tensor-paral 2. Did you mean '--tensor-parallel-"):
        parse(["model", "--tensor-parallel-size", "1", "--tensor-paral", "2"])
