"""The command line as its user meets it: in a process of its own, by its exit code and what it prints."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qvq_serve.cli import fitting
from qvq_serve.gpu import GIB, Gpu

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("QVQ_")}


def qvq_serve(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qvq_serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=CLEAN | environ, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["ask", "--help"], ["download", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom qvq_serve.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'vllm', 'transformers', 'openai', 'modelscope', 'pynvml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "usage: qvq-serve" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--prot", "1"], 2, "unknown argument '--prot'. Did you mean '--port'?"),
        (["sevre"], 2, "unknown command 'sevre'. Did you mean 'serve'?"),
        (["--profile", "qvq72b_h200"], 2, "Did you mean 'qvq72b_h200x"),
        (["--tp"], 2, "--tp: expected one argument"),
        (["--tp", "3", "--dry-run"], 2, "of these, 1, 2, 4, 8, 16 would do"),
        (["--demo", "--tp", "3"], 2, "--tp 3: the model's 4 attention heads"),
        (["--demo", "--profile", "qvq72b_h100x4_bf16"], 2, "are both given"),
        (["--model", "/none/there"], 2, "--model /none/there: there is no such directory"),
        (["--demo", "--", "--port", "9"], 2, "--port after -- is set by qvq-serve's own --port"),
        (["ask", "/none/image.png", "What?"], 2, "the image /none/image.png cannot be read: No such file"),
        (["ask", "What?", "--url", "http://127.0.0.1:9"], 3, "no server answers at http://127.0.0.1:9"),
        (["ask", "What?", "--", "--x"], 2, "starts no vLLM"),
        (["plan", "--gpu", "h20"], 2, "--gpu h20: not a known card. Did you mean 'h200'?"),
        (["plan"], 2, "no NVIDIA GPU is visible on this machine; --gpu h200 plans for one"),
        (["download", "--model", "qvq-7b"], 2, "Did you mean 'qvq-72b'?"),
        (["download", "--model", "qvq-72b-awq", "--source", "modelscope"], 2, "is on huggingface"),
    ],
)
def test_a_mistake_gets_its_exit_code_and_one_line(arguments: list[str], code: int, message: str) -> None:
    done = qvq_serve(*arguments)
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in qvq_serve("--debug", "--tp", "3").stderr


def test_an_unwritable_cache_is_named() -> None:
    done = qvq_serve("download", "--model", "qvq-72b", QVQ_CACHE="/proc/none")
    assert done.returncode == 3
    assert "/proc/none/models/Qwen/QVQ-72B-Preview cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_variable_that_nothing_reads_is_named_and_ignored() -> None:
    done = qvq_serve("--demo", "--print-config", QVQ_MAX_IMAGE="3", QVQ_SERVICE_HOST="10.0.0.1")
    assert done.returncode == 0
    assert "QVQ_MAX_IMAGE is not known, and ignored. Did you mean 'QVQ_MAX_IMAGES'?" in done.stderr


def test_print_config_gives_each_source_and_no_key() -> None:
    done = qvq_serve("--demo", "--print-config", "--api-key", "hush-hush", "--max-images", "2", QVQ_PORT="9000")
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert lines["max_images"].endswith("--max-images")
    assert lines["port"].endswith("QVQ_PORT")
    assert lines["max_model_len"].endswith("demo")
    assert "(given)" in lines["api_key"]
    assert "hush" not in done.stdout + done.stderr


def test_dry_run_prints_what_vllm_is_given_without_vllm() -> None:
    done = qvq_serve("--tp", "4", "--dry-run", "--api-key=hush-hush", "--", "--max-num-seqs", "64")
    assert done.returncode == 0
    last = done.stdout.splitlines()[-1]
    assert last.startswith("vllm serve ")
    assert "--tensor-parallel-size 4" in last
    assert last.endswith("--max-num-seqs 64")
    assert "hush" not in done.stdout + done.stderr


def test_the_profiles_are_listed_with_their_proof() -> None:
    lines = qvq_serve("--profile", "list").stdout.splitlines()
    assert next(line for line in lines if line.startswith("qvq72b_h100x4_bf16")).count("untested") == 1
    assert next(line for line in lines if line.startswith("demo")).count("verified: benchmarks/results/") == 1
    two = next(line for line in lines if line.startswith("qvq72b_h200x2_bf16"))
    assert ".json; but vLLM's fused all-reduce was off" in two


def test_a_profile_that_the_cards_choose_and_nobody_ran_is_said_to_be_untested(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, gib, cards, untested in (("H100", 79.6, 4, True), ("H200", 140.5, 1, False)):
        fitting([Gpu(i, name, int(gib * GIB)) for i in range(cards)])
        assert capsys.readouterr().err.endswith("; untested\n") == untested


def test_with_no_arguments_and_no_gpu_the_demo_is_chosen_and_said() -> None:
    done = qvq_serve("--dry-run", CUDA_VISIBLE_DEVICES="")
    assert "no NVIDIA GPU is visible, so this serves the built-in demo model" in done.stderr
    assert "--served-model-name qvq-demo" in done.stdout


def test_plan_prints_a_table_and_its_exit_code_says_whether_it_fits() -> None:
    done = qvq_serve("plan", "--gpu", "h200", "--quantization", "fp8_per_channel", "--kv-cache-dtype", "fp8")
    assert done.returncode == 0
    assert re.search(r"weights +70\.\d\d  fp8", done.stdout)
    assert "typical ones of 3584" in done.stdout
    short = qvq_serve("plan", "--gpu", "h100", "--typical-output", "512", "--", "--max-num-seqs", "64")
    assert (short.returncode, "does not fit: weights" in short.stdout) == (4, True)
    assert "would fit: four-bit weights (--model qvq-72b-awq)" in short.stdout
    assert "typical ones of 2048" in short.stdout


def test_plan_as_json_has_every_use() -> None:
    done = qvq_serve("plan", "--gpu", "h100", "--tp", "4", "--json")
    found = json.loads(done.stdout)
    assert (found["gpu"], found["num_gpus"], found["tp"]) == ({"name": "H100", "memory_gib": 79.18}, 4, 4)
    assert set(found["per_gpu_gib"]) == {
        "weights", "vision_encoder", "activation_peak", "encoder_cache", "cuda_graphs", "non_torch", "kv_cache",
        "requested", "headroom",
    }  # fmt: skip
    assert found["fits"] is True
    assert set(found["max_requests"]) == {"at_max_model_len", "typical"}


@pytest.fixture
def in_blocks(tmp_path: Path) -> str:
    """QVQ's config in FP8 with a scale a block of 128 x 128, which only --tp 1 does not cut: 29568 is 128 x 231."""
    config = json.loads((Path(__file__).parents[2] / "qvq_serve" / "configs" / "qvq-72b.json").read_text())
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
    quantization = {"quant_method": "compressed-tensors", "config_groups": {"FP8_BLOCK": {"weights": weights}}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return str(tmp_path)


@pytest.mark.parametrize("way", [["plan", "--gpu", "h200"], ["plan", "--gpu", "h200", "--values"], ["--dry-run"]])
def test_groups_that_a_split_cuts_are_refused_by_the_plan_too(way: list[str], in_blocks: str) -> None:
    """`plan --tp 2` gave such a checkpoint 568144 tokens on two H200, and exit code 0; vLLM refuses it."""
    done = qvq_serve(*way, "--model", in_blocks, "--tp", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--tp 2: 29568 MLP columns give each GPU 14784" in done.stderr


def test_no_split_that_cuts_groups_is_proposed(in_blocks: str) -> None:
    """It was `would fit: 2 GPUs (--tp 2)`, and --fit's `--model …/in_blocks --tp 2`."""
    card = ("plan", "--gpu", "h100", "--model", in_blocks)
    done = qvq_serve(*card)
    assert (done.returncode, "--tp" in done.stdout) == (4, False)
    fitted = qvq_serve(*card, "--num-gpus", "2", "--fit").stdout.splitlines()[-1]
    assert fitted == "qvq-serve --model qvq-72b-awq --tp 2 --kv-cache-dtype fp8"


def test_plan_fit_prints_the_line_that_starts_it() -> None:
    done = qvq_serve("plan", "--gpu", "h100", "--num-gpus", "2", "--fit")
    line = "qvq-serve --model qvq-72b --tp 2 --quantization fp8_per_channel --kv-cache-dtype fp8"
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, line)
    assert "which may have more room: --profile qvq72b_h100x2_fp8\n" in done.stdout
    assert "a shipped profile" not in qvq_serve("plan", "--gpu", "60", "--num-gpus", "2", "--fit").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tp", "4", "--", "--tensor-parallel-size", "8"], 2, "is set by qvq-serve's own --tp"),
        (["--tp", "4", "--max-model-len", "500000"], 2, "above the model's context of 128000"),
        (["--tp", "4", "--kv-cache-dtype", "fp9"], 2, "--kv-cache-dtype fp9: the plan does not know it"),
        (["--quantization", "awq"], 2, "is not quantised so"),
        (["--model", "qvq-72b-awq", "--quantization", "fp8_per_channel"], 2, "is quantised already, with awq"),
        (["--tp", "4", "--", "--max-num-seqs", "-5"], 2, "--max-num-seqs -5: it must be a whole number from 1 up"),
        (["--gpu", "inf"], 2, "--gpu inf: a card's GiB"),
        (["--num-gpus", "0"], 2, "0 is no whole number from 1"),
        (["--typical-output", "-1536"], 2, "-1536 is no whole number from 1"),
        (["--fit", "--tp", "2"], 2, "--fit chooses --tp itself, and --tp gives it"),
        (["--values", "--fit"], 2, "for which --fit means nothing"),
        (["--gpu", "l4", "--fit"], 4, "no setting of QVQ-72B fits 1 x L4"),
        (["--request-timeout", "nan"], 2, "--request-timeout nan: it must be a finite number"),
        (["--metrics-port", "8000"], 2, "--metrics-port 8000 is --port too"),
        (["--fit", "--max-model-len", "500000"], 2, "above the model's context of 128000"),
        (["--tp", "4", "--", "--max-num-seqs", "9000"], 2, "is above --max-num-batched-tokens 8192"),
        (["--open-routes", "tokenize"], 2, "/tokenize would do"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: list[str], code: int, message: str) -> None:
    done = qvq_serve("plan", "--gpu", "h100", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_file_of_settings_leaves_the_choice_to_the_cards(tmp_path: Path) -> None:
    """Any --config switched it off, and a server without GPUs did not serve the demo."""
    file = tmp_path / "mine.toml"
    file.write_text("port = 9000\n")
    done = qvq_serve("--config", str(file), "--print-config")
    assert "so this serves the built-in demo model" in done.stderr
    file.write_text('model = "qvq-72b"\n')
    assert "demo" not in qvq_serve("--config", str(file), "--print-config").stderr


def test_a_file_that_cannot_be_looked_at_is_named() -> None:
    """As one is that this user may not read; which root, who runs tests in a container, always may."""
    name = "/" + "x" * 300
    done = qvq_serve("check", "--model", name)
    assert (done.returncode, done.stderr) == (3, f"qvq-serve: {name}: File name too long.\n")


DRIVER = """
class NVMLError(Exception): pass
class NVMLError_LibraryNotFound(NVMLError): pass
class NVMLError_DriverNotLoaded(NVMLError): pass
class NVMLError_LibRmVersionMismatch(NVMLError): pass
def nvmlInit(): raise {error}("Driver/library version mismatch")
"""


def test_a_driver_that_fails_is_no_machine_without_gpus(tmp_path: Path) -> None:
    """After an upgrade of the driver a server that chose by its cards came back with the demo."""
    for error, code, message in (
        ("NVMLError_DriverNotLoaded", 0, "no NVIDIA GPU is visible, so this serves the built-in demo model"),
        ("NVMLError_LibRmVersionMismatch", 3, "the NVIDIA driver fails: Driver/library version mismatch"),
    ):
        (tmp_path / "pynvml.py").write_text(DRIVER.format(error=error))
        done = qvq_serve("--dry-run", PYTHONPATH=f"{tmp_path}")
        assert (done.returncode, message in done.stderr) == (code, True), done.stderr
        assert qvq_serve("plan", "--gpu", "h200", "--tp", "2", PYTHONPATH=f"{tmp_path}").returncode == 0


FOUR_CARDS = """
class NVMLError(Exception): pass
class NVMLError_LibraryNotFound(NVMLError): pass
class NVMLError_DriverNotLoaded(NVMLError): pass
class Memory: total = 80 * 2**30
def nvmlInit(): pass
def nvmlShutdown(): pass
def nvmlDeviceGetCount(): return 4
def nvmlDeviceGetHandleByIndex(index):
    if index == 3: raise NVMLError("GPU is lost")
    return index
def nvmlDeviceGetMemoryInfo(card): return Memory
def nvmlDeviceGetUUID(card): return f"GPU-{card}abc"
def nvmlDeviceGetName(card):
    if card == 2: raise NVMLError("GPU is lost")
    return "NVIDIA H100"
"""


@pytest.mark.parametrize(("chosen", "code"), [("0,1", 0), ("GPU-1", 0), ("", 0), ("1,3", 3), ("2", 3), (None, 3)])
def test_a_card_that_fell_off_the_bus_stops_only_who_would_use_it(
    tmp_path: Path, chosen: str | None, code: int
) -> None:
    (tmp_path / "pynvml.py").write_text(FOUR_CARDS)
    environ = {"PYTHONPATH": f"{tmp_path}"} | ({} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen})
    done = qvq_serve("--model", "demo", "--dry-run", **environ)
    assert done.returncode == code, done.stderr
    card = 3 if chosen == "1,3" else 2
    told = f"GPU {card} fails: GPU is lost; CUDA_VISIBLE_DEVICES can name the others"
    assert (told in done.stderr) == (code == 3)


def test_plan_fit_keeps_what_it_does_not_choose() -> None:
    done = qvq_serve("plan", "--gpu", "h100", "--num-gpus", "2", "--fit", "--max-images", "2", "--", "--seed", "1")
    assert done.stdout.splitlines()[-1].endswith("--kv-cache-dtype fp8 --max-images 2 -- --seed 1")


def test_what_would_fit_has_no_more_gpus_than_there_are() -> None:
    """It was `would fit: FP8 KV cache (--kv-cache-dtype fp8)`, with which the GPUs are as few."""
    done = qvq_serve("plan", "--gpu", "h200", "--num-gpus", "2", "--tp", "4")
    assert (done.returncode, "needs 4 GPUs, and there are 2" in done.stdout) == (4, True)
    offered = [line for line in done.stdout.splitlines() if "would fit" in line]
    assert any("--tp 2" in line for line in offered) and all("GPUs (--tp" in line for line in offered), done.stdout


def test_a_flag_without_its_key_takes_no_other_flag_for_one() -> None:
    done = qvq_serve("--api-key", "--demo", "--print-config")
    assert (done.returncode, "expected one argument" in done.stderr) == (2, True)


@pytest.mark.parametrize("key", [None, "hush-hush"])
def test_a_server_that_is_open_to_the_network_says_so_and_one_with_a_key_does_not(key: str | None) -> None:
    environ = {"QVQ_API_KEY": key} if key else {}
    done = qvq_serve("--demo", "--host", "0.0.0.0", "--port", "18994", "--", "--no-such-flag", **environ)
    assert (done.returncode, "is open to the network, and no --api-key" in done.stderr) == (2, key is None), done.stderr


def test_check_finds_what_vllm_and_the_hooks_would_refuse(tmp_path: Path) -> None:
    slip = tmp_path / "slip.toml"
    slip.write_text("[vllm]\nmax-num-sequences = 64\n")
    for arguments, message in (
        (["--hook", "nosuch:Mod"], "--hook"),
        (["--config", str(slip)], "unrecognized arguments: --max-num-sequences 64. Did you mean '--max-num-seqs'?"),
        (["--", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ):
        done = qvq_serve("check", "--demo", *arguments)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr


def test_plan_imports_no_torch() -> None:
    program = (
        "import sys; from qvq_serve.cli import main; main(['plan', '--gpu', 'h200']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_check_says_that_nothing_stands_against_a_start(tmp_path: Path) -> None:
    done = qvq_serve("check", "--demo", "--port", "18998", QVQ_CACHE=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "nothing stands against a start\n"), done.stderr


def test_the_harness_is_installed_beside_it() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "qvq-bench", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert {"run", "sweep", "serve-and-sweep", "report", "compare"} <= set(done.stdout.split())
