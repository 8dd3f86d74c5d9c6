"""The memory plan: its arithmetic, and what vLLM measured on real cards."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.check_plan import FIXED_LIMIT, KV_LIMIT, USE_LIMIT_GIB, WEIGHTS_LIMIT, Comparison, compare
from benchmarks.geometry import config_of
from qvq_serve import cli, memory
from qvq_serve.advice import fit, suggestions
from qvq_serve.api.memory import label
from qvq_serve.errors import DoesNotFit, UsageError
from qvq_serve.gpu import GIB, Gpu
from qvq_serve.kubernetes import figures
from qvq_serve.memory import (
    ALLOCATOR_VARIABLES,
    FITTED,
    MemoryPlan,
    as_table,
    card_memory,
    card_of,
    engine_limits,
    kv_bytes_per_token,
    plan,
    queue_limit,
)
from qvq_serve.model import ModelGeometry
from qvq_serve.profile import Profile, resolve, shipped_profiles

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
RUNS = json.loads((RESULTS / "memory_2026-11-24.json").read_text())
STARTS = [
    start
    for start in json.loads((RESULTS / "starts_2026-11-24.json").read_text())
    if start["name"] != "demo"  # it had another geometry then
]
PARALLEL = json.loads((RESULTS / "starts_2026-11-28.json").read_text())
"""Starts at TP 2 and 4, which the share of CUDA graphs that TP divides was fitted to."""
SMALL_STEPS = json.loads((RESULTS / "starts_2026-11-29.json").read_text())
"""Starts with 256 tokens a step, by FlashInfer, and by FlashAttention 3 with whole graphs; and of AWQ's weights, which
AWQ_FRAGMENTS was fitted to."""
QVQ = ModelGeometry.load("qvq-72b")
H100, H200 = card_memory("h100")[1], card_memory("h200")[1]


def planned(profile: Profile, memory_bytes: int = H200, gpus: int = 1) -> MemoryPlan:
    return plan(profile, ModelGeometry.load(profile.model), "H200", memory_bytes, gpus)


@pytest.fixture
def usual_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's allocator as it is by itself, as in measurements before we told it anything."""
    monkeypatch.setenv(ALLOCATOR_VARIABLES[0], "expandable_segments:False")


@pytest.mark.usefixtures("usual_segments")
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["setting"]["name"])
def test_each_measured_run_is_planned_within_the_limits(run: dict[str, object]) -> None:
    """KV tokens and weights within 3 %, everything but the KV cache within 2 %, no use off by more than 0.7 GiB."""
    found: Comparison = compare(run)
    assert found.broken == [], found


@pytest.mark.usefixtures("usual_segments")
@pytest.mark.parametrize("start", STARTS, ids=lambda start: start["name"])
def test_each_start_of_the_first_server_is_planned_within_the_limits(start: dict[str, Any], capsys: Any) -> None:
    """These settings were chosen after the formulas, and nothing was changed since."""
    hold_to_the_limits(start, capsys)


@pytest.mark.parametrize("start", [*PARALLEL, *SMALL_STEPS], ids=lambda start: start["name"])
def test_each_start_of_the_server_on_a_gpu_is_planned_within_the_limits(start: dict[str, Any], capsys: Any) -> None:
    hold_to_the_limits(start, capsys)


def hold_to_the_limits(start: dict[str, Any], capsys: Any) -> None:
    arguments = start["command"].replace("/tmp/models/", "").replace("DIR/", "").split()[1:]
    card = "h200" if "H200" in start["gpu"] else "h100"
    cards = start["at_start"]["measured"]
    cards = [cards] if "weights" in cards else list(cards.values())
    cli.main(["plan", "--json", "--gpu", card, "--num-gpus", str(len(cards)), *arguments])
    made = json.loads(capsys.readouterr().out)
    assert made["kv_cache_tokens"] == pytest.approx(start["kv_cache_tokens"][1], rel=KV_LIMIT)
    gib = made["per_gpu_gib"]
    weights = gib["weights"] + gib["vision_encoder"]
    activations = gib["activation_peak"] + gib["encoder_cache"]
    uses = {"activation_peak": activations, "cuda_graphs": gib["cuda_graphs"], "non_torch": gib["non_torch"]}
    for measured in cards:
        assert weights == pytest.approx(measured["weights"], rel=WEIGHTS_LIMIT)
        for use, planned_gib in uses.items():
            assert planned_gib == pytest.approx(measured[use], abs=USE_LIMIT_GIB)
        total = measured["weights"] + sum(measured[use] for use in uses)
        assert weights + sum(uses.values()) == pytest.approx(total, rel=FIXED_LIMIT)


def test_runs_that_nothing_was_fitted_on_are_among_them() -> None:
    names = {run["setting"]["name"] for run in RUNS}
    assert set(FITTED) <= names
    assert len(names - set(FITTED)) >= 3
    assert sum(run["setting"]["model"].startswith("qvq-72b") for run in RUNS) >= 8
    assert {run["measured"]["gpu"] for run in RUNS} == {"NVIDIA H100 80GB HBM3", "NVIDIA H200"}


def test_cards_that_talk_to_each_other_have_less_to_give() -> None:
    """At TP 4 on H200 vLLM found 138.33 of 139.80 GiB free, which is less than 0.99 of the card."""
    flags = {"gpu_memory_utilization": 0.99}
    four = planned(Profile(tp=4, **flags), gpus=4)
    assert four.memory - four.context == pytest.approx(138.33 * GIB, abs=0.01 * GIB)
    assert any("requested of each card" in problem for problem in four.problems)
    assert planned(Profile(quantization="fp8_per_channel", **flags)).problems == []


def test_the_planner_has_no_table_keyed_by_setting() -> None:
    code = re.sub(r"FITTED = \(.*?\)", "", Path(memory.__file__).read_text(), flags=re.DOTALL)
    assert not [run["setting"]["name"] for run in RUNS if run["setting"]["name"] in code]


def test_a_token_of_qvq_takes_320_kib_in_bf16_and_160_in_fp8() -> None:
    assert kv_bytes_per_token(QVQ, Profile()) == 320 * 1024
    assert kv_bytes_per_token(QVQ, Profile(kv_cache_dtype="fp8")) == 160 * 1024
    assert kv_bytes_per_token(QVQ, Profile(tp=4)) == 80 * 1024
    assert kv_bytes_per_token(QVQ, Profile(pp=2)) == 160 * 1024
    assert kv_bytes_per_token(QVQ, Profile(tp=16)) == 40 * 1024  # 8 heads are repeated, not divided further


def test_qvq_in_bf16_weighs_147_gb() -> None:
    made = planned(Profile())
    total = made.uses["weights"] + made.uses["vision_encoder"] - memory.LOAD_OVERHEAD
    assert total / 1e9 == pytest.approx(146.8, rel=0.005)


def test_tensor_parallelism_divides_weights_and_the_vision_encoder_unless_it_is_split_by_data() -> None:
    one, four = planned(Profile()), planned(Profile(tp=4), gpus=4)
    assert four.uses["weights"] / one.uses["weights"] == pytest.approx(0.25, abs=0.01)
    assert four.uses["vision_encoder"] / one.uses["vision_encoder"] == pytest.approx(0.25, abs=0.01)
    by_data = planned(Profile(tp=4, vllm=("--mm-encoder-tp-mode", "data")), gpus=4)
    assert by_data.uses["vision_encoder"] == one.uses["vision_encoder"]


def test_pipeline_stages_divide_the_layers_and_each_has_a_vision_encoder() -> None:
    one, two = planned(Profile()), planned(Profile(pp=2), gpus=2)
    assert two.uses["weights"] / one.uses["weights"] == pytest.approx(0.5, abs=0.01)
    assert two.uses["vision_encoder"] == one.uses["vision_encoder"]


def test_larger_images_batches_and_graphs_take_more() -> None:
    base = planned(Profile())
    assert planned(Profile(max_visual_tokens=16384)).uses["encoder_cache"] > base.uses["encoder_cache"]
    wide = planned(Profile(vllm=("--max-num-batched-tokens", "16384")))
    assert wide.uses["activation_peak"] > 1.9 * base.uses["activation_peak"]
    assert planned(Profile(vllm=("--enforce-eager",))).uses["cuda_graphs"] == 0
    assert planned(Profile(vllm=("--max_num_seqs=128",))).uses["non_torch"] < base.uses["non_torch"] - 0.4 * GIB


def test_the_batches_that_have_graphs_can_be_named() -> None:
    base = planned(Profile())
    few = planned(Profile(vllm=("--cudagraph_capture_sizes", "256", "8", "64", "--max-num-seqs", "1024")))
    assert few.uses["cuda_graphs"] < 0.2 * base.uses["cuda_graphs"]
    assert few.notes["cuda_graphs"].startswith("3 sizes up to 256")
    beyond = planned(Profile(vllm=("--cudagraph-capture-sizes=16384",)))  # a batch has at most 8192 tokens
    assert beyond.uses["cuda_graphs"] == 0
    with pytest.raises(UsageError, match="--cudagraph-capture-sizes 8 many: they are whole numbers from 1 up"):
        planned(Profile(vllm=("--cudagraph-capture-sizes", "8", "many")))


def test_flashinfers_workspace_is_counted() -> None:
    base, other = planned(Profile()), planned(Profile(vllm=("--attention-backend=flashinfer",)))
    assert other.uses["cuda_graphs"] == base.uses["cuda_graphs"] + 394 * 2**20
    assert other.notes["cuda_graphs"].endswith("FlashInfer's workspace")


def test_the_uses_add_up_to_what_is_requested() -> None:
    made = planned(Profile(quantization="fp8_per_channel"))
    assert sum(made.uses.values()) == made.requested
    assert made.requested + made.headroom + made.context == made.memory


def test_a_kv_cache_in_bytes_is_taken_as_given() -> None:
    made = planned(Profile(quantization="fp8_per_channel", vllm=("--kv-cache-memory-bytes", str(20 * GIB))))
    assert made.uses["kv_cache"] == 20 * GIB
    assert made.kv_cache_tokens == 20 * GIB // (320 * 1024 * 16) * 16


def test_vllms_defaults_follow_the_card() -> None:
    def limits(card: str) -> tuple[int, int]:
        found = engine_limits(Profile(), card, card_memory(card)[1] / GIB)
        return found.max_num_batched_tokens, found.max_num_seqs

    assert limits("h100") == limits("h200") == (8192, 1024)
    assert limits("a100-80gb") == limits("l40s") == (2048, 256)
    assert limits("b200") == (16384, 1024)


def test_what_does_not_fit_is_said_with_changes_that_do() -> None:
    made = planned(Profile(), H100)
    assert not made.fits
    assert "weights and working memory take 142.3 GiB of each card, above the 72.8 requested" in made.problems[0]
    found = suggestions(made)
    assert [s["flags"] for s in found] == ["--tp 8", "--tp 4", "--model qvq-72b-awq"]
    for suggestion in found:  # each was tried
        assert suggestion["kv_cache_tokens"] > 32768


def test_two_changes_are_tried_where_one_is_not_enough() -> None:
    made = plan(Profile(max_model_len=128_000), QVQ, "H100", H100, 1)
    assert suggestions(made, most_gpus=1)[0]["flags"].count("--") == 2


def test_a_cache_smaller_than_the_context_does_not_fit() -> None:
    made = planned(Profile(model="qvq-72b-awq", max_model_len=128_000), H100)
    assert "fewer than --max-model-len 128000" in made.problems[0]


@pytest.mark.parametrize(
    ("card", "gpus", "tp", "model", "quantization"),
    [
        ("h100", 1, 1, "qvq-72b-awq", None),
        ("h100", 2, 2, "qvq-72b", "fp8_per_channel"),
        ("h100", 4, 4, "qvq-72b", None),
        ("h200", 1, 1, "qvq-72b", "fp8_per_channel"),
        ("h200", 2, 2, "qvq-72b", None),
    ],
)
def test_fit_takes_the_highest_precision_with_room(
    card: str, gpus: int, tp: int, model: str, quantization: str | None
) -> None:
    profile = fit(Profile(), *card_memory(card), gpus, 2048).profile
    assert (profile.tp, profile.model, profile.quantization) == (tp, model, quantization)


def test_every_shipped_profile_fits_the_cards_that_it_was_made_for() -> None:
    for file in shipped_profiles().values():
        if file.hardware.gpus:
            profile = resolve({}, {}, (file,)).profile
            card = file.hardware.name.split()[0]
            made = plan(profile, ModelGeometry.load(profile.model), *card_memory(card), file.hardware.gpus)
            assert made.problems == [], file.name
            assert made.requests(made.typical_tokens) >= 16, file.name


def test_fit_says_when_nothing_fits() -> None:
    with pytest.raises(DoesNotFit, match="no setting of QVQ-72B fits 1 x L4"):
        fit(Profile(), *card_memory("l4"), 1, 2048)


def test_cards_are_known_by_name_by_gib_and_by_what_the_driver_calls_them() -> None:
    assert card_memory("H200") == ("H200", int(139.8 * GIB))
    assert card_memory("96") == ("96 GiB", 96 * GIB)
    with pytest.raises(UsageError, match=r"--gpu h20O: not a known card\. Did you mean 'h200'"):
        card_memory("h20O")
    assert card_of(Gpu(0, "NVIDIA A100-SXM4-80GB", 80 * GIB))[0] == "A100-80GB"
    assert card_of(Gpu(0, "NVIDIA H100 NVL", int(93.6 * GIB)))[0] == "H100-NVL"
    assert card_of(Gpu(0, "NVIDIA H100 80GB HBM3", int(79.65 * GIB)))[0] == "H100"
    assert card_of(Gpu(0, "Some card", 1000)) == ("Some card", 995)


@pytest.mark.parametrize(
    ("name", "gib"), [("NVIDIA GH200 480GB", 95.6), ("NVIDIA L40", 44.99), ("NVIDIA H100-40C", 40.0)]
)
def test_a_card_whose_name_has_another_ones_in_it_has_its_own_memory(name: str, gib: float) -> None:
    assert card_of(Gpu(0, name, int(gib * GIB))) == (name, int(int(gib * GIB) * 0.995))


def test_an_unknown_quantisation_gets_the_nearest_known_one() -> None:
    with pytest.raises(UsageError, match=r"--quantization fp8_per_chanel: .* Did you mean 'fp8_per_channel'"):
        planned(Profile(quantization="fp8_per_chanel"))
    with pytest.raises(UsageError, match="--max-num-seqs many: it must be a whole number"):
        planned(Profile(vllm=("--max-num-seqs", "many")))


def compressed(ignore: list[str], **weights: Any) -> dict[str, Any]:
    """The quantization_config that llm-compressor 0.14 writes for FP8_DYNAMIC, shortened."""
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None, "block_structure": None}
    groups = {"FP8_DYNAMIC": {"format": "float-quantized", "targets": ["Linear"], "weights": fp8 | weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": groups,
        "ignore": ignore,
    }


def test_an_fp8_checkpoint_is_planned_with_the_vision_encoder_that_it_leaves_out() -> None:
    whole = plan(Profile(quantization="fp8_per_channel"), QVQ, "H200", H200, 1).uses
    for ignore, size in ((["lm_head", "re:.*visual.*"], 2), (["lm_head"], 1)):
        made = plan(Profile(), replace(QVQ, quantization=compressed(ignore)), "H200", H200, 1).uses
        assert made["weights"] == whole["weights"]
        assert made["vision_encoder"] == pytest.approx(size * whole["vision_encoder"], rel=0.01)


def test_four_bits_with_fp8_activations_are_planned_with_scales_eight_times() -> None:
    """vLLM on an H200: "Model loading took 42.88 GiB memory"; without the copies of the scales it would be 39.8."""
    config = config_of("qvq-72b-w4a8")
    for activations, gib in ((True, 42.88), (False, 39.8)):
        if not activations:
            del config["quantization_config"]["config_groups"]["group_0"]["input_activations"]
        geometry = ModelGeometry.from_config(config, Path("config.json"))
        uses = plan(Profile(), geometry, "H200", H200, 1).uses
        assert (uses["weights"] + uses["vision_encoder"]) / GIB == pytest.approx(gib, rel=0.005)


@pytest.mark.parametrize("weights", [{"num_bits": 8, "type": "int"}, {"num_bits": 4, "type": "float"}])
def test_a_checkpoint_in_another_compressed_format_is_refused(weights: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="neither all 8-bit floats nor all 4-bit integers"):
        plan(Profile(), replace(QVQ, quantization=compressed([], **weights)), "H200", H200, 1)


def test_what_the_allocator_loses_to_awqs_conversion_is_planned_where_its_segments_grow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lost(told: str, **changed: Any) -> float:
        monkeypatch.setenv(ALLOCATOR_VARIABLES[0], told)
        profile = Profile(model="qvq-72b-awq", **changed)
        return planned(profile, gpus=profile.tp).uses["non_torch"] / GIB

    without = lost("max_split_size_mb:512")
    assert lost("") - without == pytest.approx(1.83, abs=0.01)
    assert lost("expandable_segments:True") == lost("")  # what a server's own processes find
    assert lost("", tp=2) == without


def test_sequences_are_vllms_beside_its_tokens_a_step() -> None:
    """As vllm/engine/arg_utils.py has them: of 256 tokens no more sequences, and twice of all for throughput."""

    def limits(*flags: str) -> tuple[int, int]:
        found = engine_limits(Profile(vllm=flags), "h200", 139.8)
        return found.max_num_seqs, found.max_num_batched_tokens

    assert limits() == (1024, 8192)
    assert limits("--max-num-batched-tokens", "256") == (256, 256)
    assert limits("--performance-mode", "throughput") == (2048, 16384)
    assert limits("--performance-mode=throughput", "--max-num-seqs", "8") == (8, 16384)
    with pytest.raises(UsageError, match=r"--max-num-seqs 512 is above --max-num-batched-tokens 256.*lower the one"):
        limits("--max-num-batched-tokens", "256", "--max-num-seqs", "512")


def test_a_typical_request_writes_no_more_than_a_request_may() -> None:
    def typical(**settings: Any) -> tuple[int, int]:
        made = plan(Profile(tp=4, **settings), QVQ, *card_memory("h100"), 4)
        return made.output, made.typical_tokens

    assert typical() == (2048, 3584)
    assert typical(max_output_tokens=512) == (512, 2048)
    assert typical(max_model_len=2048) == (512, 2048)


def test_replicas_by_data_have_room_for_as_many_more() -> None:
    cards = [Gpu(i, "NVIDIA H100 80GB HBM3", int(79.6 * GIB)) for i in range(8)]
    one, two = Profile(tp=4), Profile(tp=4, vllm=("--data-parallel-size", "2"))
    assert queue_limit(two, cards) == pytest.approx(2 * queue_limit(one, cards), abs=1)
    made = plan(two, QVQ, *card_of(cards[0]), 8)
    assert "; at once in each of 2 replicas " in as_table(made, [])
    with pytest.raises(UsageError, match=r"--data-parallel-size 2: .* set the chart's replicas to 2"):
        figures(resolve({"tp": "4"}, {}, (), two.vllm), "h100")  # it gave 8 GPUs, which the chart refuses


def test_the_processor_cache_is_read_and_flags_that_the_plan_does_not_read_are_named() -> None:
    def made(*flags: str) -> MemoryPlan:
        return planned(Profile(tp=4, vllm=flags), gpus=4)

    assert made().host - made("--mm-processor-cache-gb", "0.5").host == 7 * GIB
    assert "not in the plan" not in as_table(made("--max-num-seqs", "64", "--seed", "1"), [])
    unread = ("--cpu-offload-gb=8", "-O3", "-cc.level=3", "--attention-config", '{"backend": "X"}')
    named = "--cpu-offload-gb, -O3, --compilation-config, --attention-config"
    assert f"\nnot in the plan: {named}" in as_table(made(*unread), [])
    with pytest.raises(UsageError, match="--mm-processor-cache-gb lots: it must be a number of GiB"):
        made("--mm-processor-cache-gb", "lots")


def test_the_queue_is_twice_what_the_plan_has_room_for_and_never_above_vllms_sequences() -> None:
    cards = [Gpu(i, "NVIDIA H100 80GB HBM3", int(79.6 * GIB)) for i in range(4)]
    profile = Profile(tp=4)
    at_once = plan(profile, QVQ, *card_of(cards[0]), 4)
    assert queue_limit(profile, cards) == math.ceil(2 * at_once.requests(at_once.typical_tokens))
    assert queue_limit(Profile(tp=4, vllm=("--max-num-seqs", "20")), cards) == 40
    assert queue_limit(Profile(model="demo"), []) == 256
    small = Gpu(4, "NVIDIA L4", 22 * GIB)  # which the launch does not use
    assert queue_limit(profile, [*cards, small]) == queue_limit(profile, cards)


def test_a_worker_on_another_machine_is_labelled_by_its_rank() -> None:
    cards = [Gpu(4, "NVIDIA H100", 80 * GIB), Gpu(5, "NVIDIA H100", 80 * GIB)]
    assert [label(rank, cards) for rank in range(3)] == ["4", "5", "rank2"]
    assert [label(rank, []) for rank in range(2)] == ["cpu", "cpu1"]
