"""What a launch gives vLLM."""

import json

import pytest

from qvq_serve.engine import OWNED, PROFILE_VARIABLE, bind_threads, command, served_name
from qvq_serve.errors import UsageError
from qvq_serve.memory import ALLOCATOR_VARIABLES
from qvq_serve.profile import Profile


def value(argv: list[str], name: str) -> str:
    return argv[argv.index(name) + 1]


def test_visual_token_bounds_reach_vllm_in_pixels_and_no_video_is_profiled() -> None:
    argv = command(Profile(min_visual_tokens=256, max_visual_tokens=1280, max_images=3), gpus=1).argv
    bounds = json.loads(value(argv, "--mm-processor-kwargs"))
    assert bounds == {"size": {"shortest_edge": 256 * 784, "longest_edge": 1280 * 784}}
    assert json.loads(value(argv, "--limit-mm-per-prompt")) == {"image": 3, "video": 0}


def test_sampling_is_ours_and_not_the_checkpoints() -> None:
    argv = command(Profile(temperature=0.7, max_output_tokens=100), gpus=1).argv
    assert value(argv, "--generation-config") == "vllm"
    sampling = json.loads(value(argv, "--override-generation-config"))
    assert sampling == {"temperature": 0.7, "top_p": 0.95, "top_k": 20, "max_new_tokens": 100}


def test_a_key_is_nowhere_but_in_its_variable() -> None:
    launch = command(Profile(api_key="hush-hush"), gpus=1)
    assert launch.secrets == {"QVQ_LAUNCHED_API_KEY": "hush-hush"}
    assert "hush" not in str(launch) + repr(launch)
    assert "QVQ_LAUNCHED_API_KEY" in str(launch)
    assert "api_key" not in json.loads(launch.environment[PROFILE_VARIABLE])


def test_arguments_after_the_dashes_come_last() -> None:
    assert command(Profile(vllm=("--max-num-seqs", "64")), gpus=1).argv[-2:] == ["--max-num-seqs", "64"]


@pytest.mark.parametrize(
    "argument",
    [
        "--tensor-parallel-size",
        "--tensor_parallel_size=2",
        "-tp",
        "--api-key",
        "--config",
        "--mm-processor-kwargs.size",
    ],
)
def test_a_flag_that_is_ours_is_refused_after_the_dashes(argument: str) -> None:
    with pytest.raises(UsageError, match=r"is set by qvq-serve's own --"):
        command(Profile(vllm=(argument, "2")), gpus=1)


@pytest.mark.parametrize("argument", ["-t", "-as", "-qfp8", "-n2"])
def test_a_short_flag_that_only_pythons_parser_knows_is_refused(argument: str) -> None:
    """-t was -tp, by which --tp's value was set after the dashes."""
    with pytest.raises(UsageError, match=f"{argument} after -- is not taken in short"):
        command(Profile(vllm=(argument, "2")), gpus=1)
    assert command(Profile(vllm=("-O3", "--seed", "-1")), gpus=1).argv[-3:] == ["-O3", "--seed", "-1"]


def test_a_switch_of_ours_cannot_be_turned_off_after_the_dashes() -> None:
    with pytest.raises(UsageError, match="--no-disable-uvicorn-access-log after -- is used by qvq-serve itself"):
        command(Profile(vllm=("--no-disable-uvicorn-access-log",)), gpus=1)


def test_every_flag_that_we_set_is_owned() -> None:
    argv = command(Profile(quantization="fp8", allowed_image_dir="/"), gpus=1).argv
    assert {a for a in argv if a.startswith("--")} <= {*OWNED, "--middleware"}  # a user's own are added


def test_the_memory_probe_of_the_workers_cannot_be_replaced() -> None:
    with pytest.raises(UsageError, match="--worker-extension-cls after -- is used by qvq-serve itself"):
        command(Profile(vllm=("--worker-extension-cls", "x.Y")), gpus=1)


@pytest.mark.parametrize("flag", ["--grpc", "--grpc_port=50051", "--data-parallel-multi-port-external-lb"])
def test_another_server_of_vllms_which_knows_no_keys_is_refused(flag: str) -> None:
    with pytest.raises(UsageError, match=f"{flag} after -- is used by qvq-serve itself"):
        command(Profile(vllm=(flag,)), gpus=1)


def test_cards_are_named_where_the_checks_and_metrics_see_it() -> None:
    with pytest.raises(UsageError, match="--device-ids after -- is set by qvq-serve's own CUDA_VISIBLE_DEVICES"):
        command(Profile(vllm=("--device-ids", "4,5")), gpus=2)


@pytest.mark.parametrize("flag", ["--speculative-config", "-sc.method", "--spec-method=ngram", "--spec_tokens"])
def test_speculation_is_refused_beside_the_governor_and_on_a_cpu(flag: str) -> None:
    with pytest.raises(UsageError, match="after -- cannot run beside --governor observe"):
        command(Profile(governor="observe", vllm=(flag, "x")), gpus=1)
    with pytest.raises(UsageError, match="after -- needs a GPU"):
        command(Profile(model="demo", vllm=(flag, "x")), gpus=0)
    assert command(Profile(vllm=(flag, "x")), gpus=1).argv[-2:] == [flag, "x"]


def test_plugins_that_are_named_outside_stay_and_ours_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "theirs")
    assert command(Profile(), gpus=1).environment["VLLM_PLUGINS"] == "qvq_serve,theirs"
    monkeypatch.delenv("VLLM_PLUGINS")
    assert "qvq_serve" in command(Profile(), gpus=1).environment["VLLM_PLUGINS"].split(",")


def test_the_allocator_is_told_on_one_gpu_where_nobody_else_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(profile: Profile, gpus: int = 1) -> str | None:
        return command(profile, gpus=gpus, cpus=[0, 1]).environment.get("PYTORCH_CUDA_ALLOC_CONF")

    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert told(Profile()) == "expandable_segments:True"
    assert told(Profile(), gpus=0) is None and told(Profile(tp=2), gpus=2) is None
    assert told(Profile(vllm=("--kv-transfer-config", '{"kv_connector": "NixlConnector"}'))) is None
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    assert told(Profile()) is None


def test_a_model_after_the_dashes_is_refused() -> None:
    with pytest.raises(UsageError, match="--model names the model"):
        command(Profile(vllm=("Qwen/Qwen2-VL-7B",)), gpus=1)


def test_cpu_workers_share_the_cores() -> None:
    assert bind_threads(2, [0, 1, 2, 3]) == "0,1|2,3"
    launch = command(Profile(model="demo", tp=2), gpus=0, cpus=[4, 6])
    assert launch.environment["VLLM_CPU_OMP_THREADS_BIND"] == "4|6"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in command(Profile(model="demo"), gpus=0, cpus=[4, 6]).environment
    with pytest.raises(UsageError, match="is 4, and this CPU has 2 cores"):
        command(Profile(model="demo", tp=4), gpus=0, cpus=[0, 1])


def test_the_served_name_is_the_repositorys_or_the_directorys() -> None:
    assert served_name(Profile()) == "Qwen/QVQ-72B-Preview"
    assert served_name(Profile(model="demo")) == "qvq-demo"
    assert served_name(Profile(model="/some/where/mine/")) == "mine"
    assert served_name(Profile(served_model_name="x")) == "x"


def test_a_machine_without_an_api_is_given_no_api_server() -> None:
    """vLLM refuses --api-server-count beside --headless."""
    assert "--api-server-count" in command(Profile(), gpus=1).argv
    assert "--api-server-count" not in command(Profile(vllm=("--nnodes", "2", "--headless")), gpus=1).argv


def test_two_machines_share_the_workers_and_their_cores() -> None:
    launch = command(Profile(model="demo", tp=2, vllm=("--nnodes", "2")), gpus=0, cpus=[0, 1])
    assert "VLLM_CPU_OMP_THREADS_BIND" not in launch.environment
    launch = command(Profile(model="demo", tp=4, vllm=("--nnodes", "2")), gpus=0, cpus=[0, 1, 2, 3])
    assert launch.environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,1|2,3"
