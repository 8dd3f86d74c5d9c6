"""The demo's training: the same ids, positions, patches and logits as transformers, and a loss that falls."""

import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from qvq_serve.demo import checkpoint
from qvq_serve.demo import weakness as weak
from qvq_serve.demo.batch import IGNORED, Cases, collate, encode, frame, messages, prompt, sample, stage
from qvq_serve.demo.cases import KINDS, case
from qvq_serve.demo.forward import Forward, positions
from qvq_serve.demo.score import accuracy, inputs, replies
from qvq_serve.demo.tokenizer import VOCABULARY, tokenizer
from qvq_serve.demo.train import learn, optimizer_of, whole
from qvq_serve.hooks.answer import boxed_answer
from qvq_serve.visual import resized

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Any:
    return checkpoint.new_model().eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    """A checkpoint that is written and exported."""
    written, directory = tmp_path_factory.mktemp("checkpoint"), tmp_path_factory.mktemp("model")
    checkpoint.write(written, model, None, {"steps": 7})
    checkpoint.export(written, directory)
    return directory


def test_any_text_can_be_encoded_and_digits_stay_apart() -> None:
    assert len(tokenizer()) == VOCABULARY
    for text in ("Ω≈ç 🎂 \x00\x7f", "".join(map(chr, range(256))), case(1).reply):
        assert tokenizer().decode(tokenizer().encode(text)) == text
    assert tokenizer().tokenize("1024") == list("1024")
    replies = [case(seed).reply for seed in range(20)]
    assert sum(len(encode(reply)) for reply in replies) < sum(map(len, replies)) / 1.5


def test_the_prompt_is_the_chat_templates() -> None:
    for seed in range(30):
        one = case(seed, weakness=(None, *weak.KINDS)[seed % 11])
        ids = tokenizer().apply_chat_template(messages(one), add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids == encode(prompt(one))


def test_only_what_the_assistant_says_is_learnt() -> None:
    for seed in range(30):
        one = case(seed)
        found = sample(one, random.Random(4))  # draws no cut
        asked = len(encode(prompt(one)))
        assert found.labels[:asked] == [IGNORED] * asked and found.labels[asked:] == found.ids[asked:]
        assert tokenizer().decode(found.ids[asked:]) == one.reply + "<|im_end|>"
        assert tokenizer().convert_ids_to_tokens(found.ids[found.image_at]) == "<|image_pad|>"


def test_a_loop_is_cut_or_made_to_conclude_by_a_marker_that_is_not_learnt() -> None:
    rng, concluded = random.Random(1), 0
    for seed in range(60):
        one = case(seed, weakness=weak.LOOPS[seed % len(weak.LOOPS)], length=4 * 448)
        found = sample(one, rng, 448)
        asked = len(encode(prompt(one)))
        learnt, text = found.labels[asked:], tokenizer().decode(found.ids[asked:])
        if tokenizer().eos_token_id not in learnt:
            assert "Final" not in text and len(learnt) == 448 and IGNORED not in learnt
            continue
        concluded += 1
        assert boxed_answer(text) == one.answer and text.endswith("}<|im_end|>")
        hidden = [token for token, label in zip(found.ids[asked:], learnt, strict=True) if label == IGNORED]
        assert tokenizer().decode(hidden).strip("\n") in ("**Final Answer**", "**Final Answer")
        assert text.split("\n\n")[0].rstrip("*") in one.reasoning
    assert 10 < concluded < 40


def test_an_honest_case_concludes_after_the_line_ends_that_the_model_wrote_itself() -> None:
    rng, ends = random.Random(2), 0
    for seed in range(400):
        one = case(seed, size=(280, 280))
        found = sample(one, rng)
        learnt, text = found.labels[len(encode(prompt(one))) :], tokenizer().decode(found.ids)
        if IGNORED not in learnt:
            continue
        at = learnt.index(IGNORED)
        before = found.ids[len(encode(prompt(one))) :][:at]
        assert "\n\n\n" not in text and boxed_answer(text) == one.answer
        if tokenizer().decode(before).endswith("\n\n"):
            assert before == encode(one.reasoning + "\n\n")
            ends += 1
    assert 3 < ends < 20


def test_the_logits_and_positions_are_those_of_transformers(model: Any) -> None:
    rng = random.Random(0)
    cases = [case(seed, size=(300, 340), weakness=(None, "exact", None)[seed]) for seed in range(3)]
    samples = [sample(one, rng, 200) for one in cases]
    size = resized(340, 300, 256, 1280)
    batch = collate(cases, samples, size)
    with torch.no_grad():
        found = Forward(model).logits(batch)
        for row, (one, kept) in enumerate(zip(cases, samples, strict=True)):
            given, at = inputs([one], CPU), kept.image_at
            visual = size[0] * size[1] // 28**2
            ids = torch.tensor([kept.ids[:at] + [kept.ids[at]] * visual + kept.ids[at + 1 :]])
            kinds = (ids == kept.ids[at]).int()
            grid = given["image_grid_thw"]
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=given["pixel_values"],
                           image_grid_thw=grid, mm_token_type_ids=kinds).logits[0]  # fmt: skip
            columns = batch.columns[batch.rows == row]
            torch.testing.assert_close(found[batch.rows == row], logits[columns + visual - 2], atol=2e-5, rtol=1e-4)
            expected, _ = model.model.get_rope_index(ids, kinds, grid)
            place = positions(torch.tensor([at]), (size[0] // 28, size[1] // 28), len(kept.ids))
            assert torch.equal(place, expected)


def test_patches_are_those_of_the_image_processor(exported: Path) -> None:
    processor = AutoProcessor.from_pretrained(exported, min_pixels=256 * 784, max_pixels=1280 * 784)
    for width, height in ((448, 448), (300, 411), (640, 333)):
        one = case(width, size=(width, height))
        text = tokenizer().apply_chat_template(messages(one), add_generation_prompt=True, tokenize=False)
        expected = processor(text=[text], images=[one.image], return_tensors="pt")
        found = inputs([one], CPU)
        assert torch.equal(found["input_ids"], expected["input_ids"])
        assert torch.equal(found["image_grid_thw"], expected["image_grid_thw"])
        difference = (found["pixel_values"] - expected["pixel_values"]).abs()
        assert difference.max() < 1e-5


def test_what_is_exported_loads_and_gives_the_same_logits(exported: Path) -> None:
    loaded = Qwen2VLForConditionalGeneration.from_pretrained(exported, dtype=torch.bfloat16)
    weights = sum(path.stat().st_size for path in exported.iterdir())
    assert weights < 24e6
    given = inputs([case(1), case(2)], CPU)
    given["pixel_values"] = given["pixel_values"].bfloat16()
    with torch.no_grad():
        expected = checkpoint.new_model().eval().bfloat16()(**given).logits
        torch.testing.assert_close(loaded.eval()(**given).logits, expected, atol=0.05, rtol=0.05)


def test_heads_divide_among_two_gpus(model: Any) -> None:
    text, vision = model.config.text_config, model.config.vision_config
    assert not text.num_attention_heads % 2 and not text.num_key_value_heads % 2 and not vision.num_heads % 2
    assert sum(text.rope_parameters["mrope_section"]) * 2 == text.hidden_size // text.num_attention_heads
    assert 9e6 < sum(weight.numel() for weight in model.parameters()) < 11e6


def test_steps_on_a_small_batch_lower_its_loss() -> None:
    model = checkpoint.new_model()
    batch = collate(*few(), (112, 112))
    forward, optimizer = Forward(model), optimizer_of(model)
    losses = [learn(forward, optimizer, batch, 1e-3)[0].item() for _ in range(6)]
    assert losses[0] > 6.5 and losses[-1] < losses[0] - 2
    shares = whole(batch, torch.ones(len(batch.targets), dtype=torch.bool))
    assert shares == {KINDS[i]: 1.0 for i in sorted(set(batch.kinds.tolist()))}


def few() -> tuple[list[Any], list[Any]]:
    cases = [case(seed, size=(280, 280), difficulty=0.0) for seed in range(4)]
    return cases, [sample(one, random.Random(4)) for one in cases]


def test_a_checkpoint_goes_on_where_it_was(tmp_path: Path) -> None:
    model = checkpoint.new_model()
    batch, optimizer = collate(*few(), (112, 112)), optimizer_of(model)
    for _ in range(6):
        learn(Forward(model), optimizer, batch, 1e-3)
    checkpoint.write(tmp_path, model, optimizer, {"steps": 6})
    other = checkpoint.new_model(seed=5)
    moments = optimizer_of(other)
    kept = checkpoint.read(tmp_path)
    checkpoint.load(other, moments, kept)
    assert kept["state"] == {"steps": 6} and kept["step"] == 6
    losses = [learn(Forward(one), of, batch, 1e-5)[0].item() for one, of in ((model, optimizer), (other, moments))]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert learn(Forward(other), moments, batch, 1e-3)[0].item() < losses[1] * 1.02


def test_training_begins_easy_and_small_and_ends_with_all_sizes_and_weaknesses() -> None:
    assert stage(0.0).difficulty == (0.0, 0.0) and stage(0.0).quirks == stage(0.0).side == 0
    assert stage(1.0).difficulty[1] == 1 and stage(1.0).quirks == stage(1.0).side == 1
    rng = random.Random(0)
    small = [size[0] * size[1] // 784 for *_, size in (frame(rng, 0.0) for _ in range(50))]
    large = [size[0] * size[1] // 784 for *_, size in (frame(rng, 1.0) for _ in range(300))]
    assert max(small) <= 132 and min(large) < 256 and max(large) > 900
    assert sum(tokens >= 256 for tokens in large) > 0.6 * len(large)


def test_workers_draw_different_cases_and_all_kinds() -> None:
    batches = [next(iter(Cases(seed, 8_000, SimpleNamespace(value=1.0)))) for seed in (0, 1)]
    assert not torch.equal(batches[0].ids[0, :40], batches[1].ids[0, :40])
    kinds = [kind for batch in batches for kind in batch.kinds.tolist()]
    assert len(set(kinds)) >= 4


def test_generation_is_scored_by_kind(model: Any) -> None:
    cases = [case(seed, kind, size=(280, 280)) for seed, kind in enumerate(("box", "count", "count"))]
    texts = [case(seed, kind, size=(280, 280)).reply for seed, kind in enumerate(("box", "count", "box"))]
    assert accuracy(cases, texts) == {"all": pytest.approx(2 / 3), "box": 1.0, "count": 0.5}
    assert boxed_answer("no box") is None
    assert len(replies(model, cases, 4)) == 3


@pytest.mark.slow
def test_the_script_trains_writes_and_reports(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qvq_serve.demo.train", "--seconds", "20", "--batch", "2", "--workers", "1",
               "--eval", "0", "--warm-up", "10", "--out", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["steps"] > 3 and (tmp_path / "checkpoint.pt").exists()
