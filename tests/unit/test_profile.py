"""One launch, described once: precedence, sources, and errors that name what was given."""

from pathlib import Path

import pytest

from qvq_serve.errors import UsageError
from qvq_serve.profile import (
    NAMES,
    Profile,
    given_flags,
    read_profile,
    resolve,
    shipped_profiles,
    vllm_arguments,
    workers,
)


def profile_file(tmp_path: Path, text: str, name: str = "mine.toml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_defaults_are_the_tutorials() -> None:
    profile = resolve(environ={}).profile
    assert (profile.min_visual_tokens, profile.max_visual_tokens, profile.max_model_len) == (256, 1280, 32768)
    assert profile.system_prompt.endswith("You should think step-by-step.")


def test_flag_beats_variable_beats_later_file_beats_earlier_file_beats_default(tmp_path: Path) -> None:
    first = read_profile(profile_file(tmp_path, "tp = 2\npp = 2\nport = 1\nmax_images = 9", "first.toml"))
    second = read_profile(profile_file(tmp_path, "pp = 3\nport = 2\nmax_images = 8", "second.toml"))
    resolved = resolve({"max_images": "5"}, {"QVQ_PORT": "3", "QVQ_MAX_IMAGES": "6"}, (first, second))
    profile, sources = resolved.profile, resolved.sources
    assert (profile.max_images, sources["max_images"]) == (5, "--max-images")
    assert (profile.port, sources["port"]) == (3, "QVQ_PORT")
    assert (profile.pp, sources["pp"]) == (3, "second")
    assert (profile.tp, sources["tp"]) == (2, "first")
    assert (profile.host, sources["host"]) == ("127.0.0.1", "default")


def test_every_value_has_a_source() -> None:
    assert set(resolve(environ={}).sources) == set(NAMES)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tp": "four"}, "--tp is 'four', and must be an integer."),
        ({"tp": "0"}, "--tp 0: it must be at least 1."),
        ({"gpu_memory_utilization": "92"}, "--gpu-memory-utilization 92.0: it is a share"),
        ({"min_visual_tokens": "2000"}, "--min-visual-tokens 2000 is above --max-visual-tokens 1280"),
        ({"max_model_len": "1280"}, "--max-visual-tokens 1280 leaves no room for text in --max-model-len 1280"),
        ({"port": "70000"}, "--port 70000: a port is a number from 1 to 65535"),
        ({"api_key": " "}, "the API key is empty"),
        ({"api_key": "a", "api_key_file": "b"}, "both an API key and --api-key-file are given"),
        ({"temperature": "3"}, "--temperature 3.0: it must be from 0 (greedy) to 2"),
        ({"top_p": "0"}, "--top-p 0.0: it is a share"),
        ({"quantization": ""}, "--quantization is empty; leave it out, or name one"),
        ({"top_k": "0"}, "--top-k 0: it must be at least 1."),
        ({"max_output_tokens": "0"}, "--max-output-tokens 0: it must be at least 1."),
        ({"guard_url": "http://guard", "guard_timeout": "5"}, "--guard-timeout 5.0: it must be less than half of"),
        ({"image_timeout": "0"}, "--image-timeout 0.0: it must be above 0 seconds"),
    ],
)
def test_a_value_that_cannot_be_is_named(flags: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        resolve(flags, {})
    assert message in str(error.value)


def test_the_variable_that_kubernetes_sets_for_a_service_named_qvq_is_explained() -> None:
    with pytest.raises(UsageError, match=r"QVQ_PORT is 'tcp://10\.0\.0\.1:80'.*enableServiceLinks"):
        resolve({}, {"QVQ_PORT": "tcp://10.0.0.1:80"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tpp = 4", "unknown key 'tpp'. Did you mean 'tp'?"),
        ("tp = '4'", "tp is '4', and must be an integer"),
        ("tp = true", "tp is True, and must be an integer"),
        ("tp = ", "is not TOML"),
        ("[hardware]\ngpu = 4", "unknown key 'gpu' in [hardware]. Did you mean 'gpus'?"),
        ("hardware = 3", "hardware is 3, and must be a table"),
        ("vllm = 'x'", "vllm is 'x', and must be a table"),
        ("description = 5", "description is 5, and must be text"),
        ("differs = 5", "differs is 5, and must be text"),
        ('[hardware]\ngpus = "2"', "gpus in [hardware] is '2', and must be an integer"),
        ("[vllm]\ncompilation-config = {a = 2020-01-01}", "[vllm] has what no flag can take"),
    ],
)
def test_a_file_that_cannot_be_is_named_with_its_key(tmp_path: Path, text: str, message: str) -> None:
    path = profile_file(tmp_path, text)
    with pytest.raises(UsageError) as error:
        read_profile(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UsageError, match=r"/none/there\.toml cannot be read: No such file"):
        read_profile(Path("/none/there.toml"))


def test_vllm_tables_become_arguments_and_what_follows_the_dashes_replaces_them(tmp_path: Path) -> None:
    text = "[vllm]\nmax-num-seqs = 64\nenforce-eager = true\nenable-prefix-caching = false\nattention-config = {a = 1}"
    file = read_profile(profile_file(tmp_path, text))
    assert vllm_arguments(file.vllm) == [
        ["--max-num-seqs", "64"],
        ["--enforce-eager"],
        ["--no-enable-prefix-caching"],
        ["--attention-config", '{"a": 1}'],
    ]
    given = resolve({}, {}, (file,), ("--max_num_seqs=8",)).profile.vllm
    assert "64" not in given
    assert given[-1] == "--max_num_seqs=8"


def test_the_key_is_the_first_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("# of the tenants, one a line\n\nhush\nold\n")
    assert Profile(api_key_file=str(file)).key() == Profile(api_key="hush\n").key() == "hush"
    for none in ("\n", "# of the tenants, one a line\n"):
        file.write_text(none)
        with pytest.raises(UsageError, match="has no key; it must be keys, one a line"):
            Profile(api_key_file=str(file)).key()
    with pytest.raises(UsageError, match="/none/key cannot be read"):
        Profile(api_key_file="/none/key").key()


def test_a_profile_was_made_for_its_own_split_and_precision(tmp_path: Path) -> None:
    """--profile qvq72b_h200x4_bf16 --tp 2 was refused on two cards, as that profile needs four."""
    file = read_profile(profile_file(tmp_path, "tp = 4\nmax_images = 2\n[hardware]\ngpus = 4"))
    assert resolve({"max_images": "3"}, {}, (file,)).hardware.gpus == 4
    assert resolve({"tp": "2"}, {}, (file,)).hardware.gpus == 0


def test_flags_of_vllms_are_read_as_vllm_reads_them() -> None:
    given = given_flags(("--enforce-eager", "-dp", "2", "--attention-config.backend", "X", "--no-enforce-eager"))
    assert "--enforce-eager" not in given
    assert (given["--data-parallel-size"], given["--attention-config"]) == ("2", "X")
    assert workers(Profile(tp=4, vllm=("-dp", "2"))) == 8
    with pytest.raises(UsageError, match="--data-parallel-size two"):
        workers(Profile(vllm=("-dp", "two")))


def test_shipped_profiles_are_sound_and_say_whether_they_were_run() -> None:
    root = Path(__file__).parents[2]
    profiles = shipped_profiles()
    assert {path.stem for path in (root / "launch" / "profiles").glob("*.toml")} == set(profiles)
    for file in profiles.values():
        profile = resolve({}, {}, (file,)).profile
        assert file.hardware.gpus in (0, profile.tp * profile.pp)
        assert file.description
        assert file.verified is None or (root / file.verified).is_file(), file.name
