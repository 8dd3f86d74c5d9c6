"""One launch, described once: defaults, --help, QVQ_* variables and TOML keys all derive from Profile's fields.

Precedence: flag > QVQ_* variable > --config file > --profile file > default. `--` passes the rest to vLLM.
"""

import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args, get_type_hints

from qvq_serve.errors import UsageError, nearest
from qvq_serve.governor.policy import read_policy

TUTORIAL_SYSTEM_PROMPT = (
    "You are a helpful and harmless assistant. You are Qwen developed by Alibaba. You should think step-by-step."
)
OPTION_TYPES = {int: "an integer", float: "a number", str: "text"}


def option(
    default: Any, help: str, *, metavar: str | None = None, vllm: str | None = None, secret: bool = False
) -> Any:
    """A field of Profile: its default, its line of --help, and vLLM's own flag where the value is simply passed on."""
    return field(default=default, metadata={"help": help, "metavar": metavar, "vllm": vllm, "secret": secret})


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One launch of the server. Raises UsageError where the values contradict each other."""

    model: str = option("qvq-72b", "known name (qvq-72b, qvq-72b-awq, demo) or directory", metavar="NAME|DIR")
    tp: int = option(1, "tensor parallelism: GPUs that share each layer", vllm="--tensor-parallel-size")
    pp: int = option(1, "pipeline parallelism: groups of layers, one after another", vllm="--pipeline-parallel-size")
    quantization: str | None = option(
        None,
        "weights: fp8_per_channel or fp8_per_tensor quantise BF16 weights at load; else the checkpoint's own",
        metavar="NAME",
        vllm="--quantization",
    )
    kv_cache_dtype: str = option(
        "auto", "KV cache: auto (the model's type) or fp8", metavar="NAME", vllm="--kv-cache-dtype"
    )
    max_model_len: int = option(32_768, "context: tokens of prompt, images and output together", vllm="--max-model-len")
    min_visual_tokens: int = option(256, "an image is enlarged to at least this many tokens of 28 x 28 px")
    max_visual_tokens: int = option(1_280, "an image is reduced to at most this many tokens of 28 x 28 px")
    max_images: int = option(4, "images in one request, at most")
    gpu_memory_utilization: float = option(
        0.92, "share of each GPU's memory that vLLM may take", vllm="--gpu-memory-utilization"
    )
    system_prompt: str = option(
        TUTORIAL_SYSTEM_PROMPT, "added where a request brings no system message; empty for none", metavar="TEXT"
    )
    # The checkpoint's own file is next to greedy (temperature 0.01), which feeds its loops; these are Qwen's values for
    # its later reasoning models.
    temperature: float = option(0.6, "sampling, where a request does not say; the checkpoint's own is next to greedy")
    top_p: float = option(0.95, "share of probability to sample from, where a request does not say")
    top_k: int = option(20, "tokens to sample from, where a request does not say")
    max_output_tokens: int = option(8_192, "output of a request: the most, and where it does not say")
    served_model_name: str | None = option(
        None, "name in /v1/models (default: the repository's or directory's)", metavar="NAME"
    )
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for all", vllm="--host")
    port: int = option(8000, "port to listen on", vllm="--port")
    api_key: str | None = option(None, "key that clients must send; never shown", metavar="KEY", secret=True)
    api_key_file: str | None = option(None, "file of keys, one a line; read again when it changes", metavar="FILE")
    open_routes: str | None = option(None, "routes of vLLM's to open, round our hooks and limits", metavar="PATHS")
    metrics_port: int | None = option(None, "port for /metrics alone (default: the server's own)")
    max_body_bytes: int = option(120_000_000, "bytes of a request's body, at most")
    max_choices: int = option(8, "n of a request, at most")
    max_queued_requests: int | None = option(
        None,
        "requests running or waiting, at most; more get a 503 (default: twice what the plan has room for)",
        metavar="N",
        vllm="--max-num-queued-reqs",
    )
    request_timeout: float = option(1800.0, "seconds that a request may take in all", metavar="SECONDS")
    keep_alive: int = option(15, "seconds of silence in a stream before a comment; 0: none")
    drain_timeout: float = option(300.0, "seconds that running requests get at SIGTERM", metavar="SECONDS")
    log_format: str = option("auto", "json, text, or auto: text on a terminal", metavar="FORMAT")
    allowed_image_dir: str | None = option(
        None,
        "file:// images are read below this directory; without it, none are",
        metavar="DIR",
        vllm="--allowed-local-media-path",
    )
    allowed_image_hosts: str | None = option(
        None,
        "hosts that image URLs may name, private ones too (a,b); without it, any on the public internet",
        metavar="HOSTS",
    )
    image_timeout: float = option(10.0, "seconds in which an image URL must have been fetched", metavar="SECONDS")
    max_image_bytes: int = option(20_000_000, "bytes of an image as it comes, at most")
    max_image_pixels: int = option(50_000_000, "pixels of an image as it comes, at most")
    thinking_budget: int | None = option(
        None, "tokens of reasoning after which the model is made to conclude, at most", metavar="N"
    )
    # 24: 0.5 ms of a step at 128 requests (benchmarks/results/repetition_*.json): vLLM checks in Python.
    loop_pattern: int = option(24, "an exact loop of up to so many tokens ends a request, after 6 rounds; 0: none does")
    governor: str = option(
        "off", "watches each chain of thought: off, observe (counts, and never acts) or on (README)", metavar="MODE"
    )
    governor_policy: str | None = option(
        None, "what the governor may do: language,circling=3,loop=false,... (README)", metavar="SWITCHES"
    )
    hook: str | None = option(None, "hooks of yours: package.module:Class, several with commas", metavar="HOOKS")
    without_hooks: str | None = option(None, "hooks to leave out (answer, language, guard, ...)", metavar="NAMES")
    hook_timeout: float = option(10.0, "seconds that a call of a hook may take", metavar="SECONDS")
    guard_url: str | None = option(None, "OpenAI-compatible server of a guard model; without it, none", metavar="URL")
    guard_model: str | None = option(None, "guard model's name there (default: the first it lists)", metavar="NAME")
    guard_api_key: str | None = option(None, "key of the guard's server; never shown", metavar="KEY", secret=True)
    guard_failure: str = option("closed", "when the guard does not answer: closed (refuse) or open", metavar="POLICY")
    guard_timeout: float = option(3.0, "seconds that the guard may take for one answer", metavar="SECONDS")
    guard_window: int = option(600, "characters of reasoning or answer that are checked together while they stream")
    guard_blocks: str = option("unsafe", "verdicts that block: unsafe, or unsafe,controversial", metavar="VERDICTS")
    guard_extra_body: str | None = option(None, "JSON added to each of the guard's requests", metavar="JSON")
    vllm: tuple[str, ...] = field(default=(), metadata={})
    """vLLM's own arguments: a file's [vllm] table, then what follows `--`."""

    def __post_init__(self) -> None:
        for name in NAMES:
            if isinstance(value := getattr(self, name), float) and not math.isfinite(value):
                raise UsageError(f"{flag(name)} {value}: it must be a finite number.")
        if self.quantization == "":
            raise UsageError("--quantization is empty; leave it out, or name one, for example fp8_per_channel.")
        for name, least in (
            ("tp", 1),
            ("pp", 1),
            ("max_model_len", 1),
            ("min_visual_tokens", 1),
            ("max_images", 1),
            ("top_k", 1),
            ("max_output_tokens", 1),
            ("max_image_bytes", 1),
            ("max_body_bytes", 1),
            ("max_choices", 1),
            ("max_queued_requests", 1),
            ("max_image_pixels", 1),
            ("thinking_budget", 1),
            ("loop_pattern", 0),
            ("guard_window", 1),
        ):
            if (value := getattr(self, name)) is not None and value < least:
                raise UsageError(f"{flag(name)} {getattr(self, name)}: it must be at least {least}.")
        if self.min_visual_tokens > self.max_visual_tokens:
            raise UsageError(
                f"--min-visual-tokens {self.min_visual_tokens} is above --max-visual-tokens {self.max_visual_tokens}; "
                "lower the one or raise the other."
            )
        if self.max_visual_tokens >= self.max_model_len:
            raise UsageError(
                f"--max-visual-tokens {self.max_visual_tokens} leaves no room for text in --max-model-len "
                f"{self.max_model_len}; lower the one or raise the other."
            )
        if not 0 <= self.temperature <= 2:
            raise UsageError(f"--temperature {self.temperature}: it must be from 0 (greedy) to 2, for example 0.6.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p}: it is a share, above 0 and at most 1, for example 0.95.")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise UsageError(
                f"--gpu-memory-utilization {self.gpu_memory_utilization}: it is a share, above 0 and at most 1, "
                "for example 0.92."
            )
        for name in ("port", "metrics_port"):
            if (port := getattr(self, name)) is not None and not 0 < port < 65536:
                raise UsageError(f"{flag(name)} {port}: a port is a number from 1 to 65535, for example 8000.")
        if self.metrics_port == self.port:
            raise UsageError(f"--metrics-port {self.metrics_port} is --port too; choose another, or leave it out.")
        for route in filter(None, (self.open_routes or "").split(",")):
            if not route.strip().startswith("/"):
                raise UsageError(f"--open-routes {route}: a route begins with a slash; /{route.strip()} would do.")
        for name in ("image_timeout", "hook_timeout", "guard_timeout", "request_timeout"):
            if (seconds := getattr(self, name)) <= 0:
                raise UsageError(f"{flag(name)} {seconds}: it must be above 0 seconds.")
        if self.guard_url and 2 * self.guard_timeout >= self.hook_timeout:  # one call may ask about both parts
            raise UsageError(
                f"--guard-timeout {self.guard_timeout}: it must be less than half of --hook-timeout, which is "
                f"{self.hook_timeout}; lower the one or raise the other."
            )
        for name, words in (
            ("guard_failure", ("open", "closed")),
            ("log_format", ("auto", "json", "text")),
            ("governor", ("off", "observe", "on")),
        ):
            if (word := getattr(self, name)) not in words:
                raise UsageError(f"{flag(name)} {word}: it is one of {', '.join(words)}.")
        read_policy(self.governor_policy)
        for name in ("keep_alive", "drain_timeout"):
            if (seconds := getattr(self, name)) < 0:
                raise UsageError(f"{flag(name)} {seconds}: it must be 0 or more seconds.")
        if self.api_key is not None and not self.api_key.strip():
            raise UsageError("the API key is empty; give a key, or leave --api-key and QVQ_API_KEY out for none.")
        if self.api_key is not None and self.api_key_file is not None:
            raise UsageError("both an API key and --api-key-file are given; leave one of them out.")

    def key(self) -> str | None:
        """The API key, the first of a file; None for an open server. Raises UsageError for a file without one."""
        if self.api_key_file is None:
            return self.api_key and self.api_key.strip()  # as a client's is; `echo key | base64` leaves a line end
        try:
            found = keys_in(Path(self.api_key_file))
        except OSError as error:
            raise UsageError(f"--api-key-file {self.api_key_file} cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise UsageError(f"--api-key-file {self.api_key_file} is no text; it must be keys, one a line.") from None
        if not found:
            raise UsageError(f"--api-key-file {self.api_key_file} has no key; it must be keys, one a line.")
        return found[0]


def keys_in(path: Path) -> list[str]:
    """The keys of a file, one a line; empty lines, and those that begin with #, are none."""
    lines = (line.strip() for line in path.read_text("utf-8-sig").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


OPTIONS = [f for f in fields(Profile) if "help" in f.metadata]
NAMES = [f.name for f in OPTIONS]


def flag(name: str) -> str:
    """The command line's flag of a field: max_images -> --max-images."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """The environment variable of a field: max_images -> QVQ_MAX_IMAGES."""
    return "QVQ_" + name.upper()


@cache
def option_type(name: str) -> type:
    """The type of a field's value: int, float or str (None, where it may be, is only a default)."""
    hint = get_type_hints(Profile)[name]
    kind: type = next((t for t in get_args(hint) if t is not type(None)), hint)
    return kind


def convert(name: str, text: str, given: str) -> Any:
    """The value of a field from a flag's or a variable's text. Raises UsageError, naming `given`, where it is none."""
    kind = option_type(name)
    try:
        return kind(text)
    except ValueError:
        hint = ""
        if given.startswith("QVQ_") and "://" in text:  # Kubernetes sets QVQ_PORT for a Service that is named qvq
            hint = " (Kubernetes sets such variables for a Service of that name: enableServiceLinks: false)"
        raise UsageError(f"{given} is '{text}', and must be {OPTION_TYPES[kind]}{hint}.") from None


@dataclass(frozen=True)
class Hardware:
    """What a profile was worked out for: how many GPUs, and of how many GiB each (0 GPUs: a CPU will do)."""

    gpus: int = 0
    gpu_gib: float = 0.0
    name: str = "CPU"


@dataclass(frozen=True)
class ProfileFile:
    """A TOML file of launch settings: Profile's fields as keys, [vllm] for vLLM's own, [hardware] for what it needs.

    `description`, `verified` (its run's result file) and `differs` (where that run was not quite this) tell of it.
    """

    name: str
    path: Path
    description: str
    verified: str | None
    differs: str | None
    hardware: Hardware
    values: dict[str, Any]
    vllm: dict[str, Any]


def read_profile(path: Path) -> ProfileFile:
    """A profile file. Raises UsageError for a file that cannot be read, an unknown key, or a value of another type."""
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}.") from None
    about = {
        key: table.pop(key, default)
        for key, default in (("description", ""), ("verified", None), ("differs", None), ("hardware", {}), ("vllm", {}))
    }
    for key, value in table.items():
        if key not in NAMES:
            known = [*NAMES, *about]
            raise UsageError(f"{path}: unknown key '{key}'.{nearest(key, known)} Known: {', '.join(known)}.")
        kind = option_type(key)
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise UsageError(f"{path}: {key} is {value!r}, and must be {OPTION_TYPES[kind]}.")
    for key in ("hardware", "vllm"):
        if not isinstance(about[key], dict):
            raise UsageError(f"{path}: {key} is {about[key]!r}, and must be a table, [{key}].")
    for key in ("description", "verified", "differs"):
        if not isinstance(about[key] or "", str):
            raise UsageError(f"{path}: {key} is {about[key]!r}, and must be text.")
    hardware_keys = {f.name: type(f.default) for f in fields(Hardware)}
    for key, value in about["hardware"].items():
        if key not in hardware_keys:
            raise UsageError(f"{path}: unknown key '{key}' in [hardware].{nearest(key, hardware_keys)}")
        kind = hardware_keys[key]
        if type(value) not in ((int, float) if kind is float else (kind,)) or (kind is not str and value < 0):
            raise UsageError(f"{path}: {key} in [hardware] is {value!r}, and must be {OPTION_TYPES[kind]}, 0 or more.")
    try:
        vllm_arguments(about["vllm"])
    except TypeError as error:
        raise UsageError(f"{path}: [vllm] has what no flag can take: {error}.") from None
    about["hardware"] = Hardware(**about["hardware"])
    return ProfileFile(path.stem, path, values=table, **about)


def shipped_profiles() -> dict[str, ProfileFile]:
    """The profiles of launch/profiles, which travel in the package, by name."""
    installed = Path(__file__).parent / "profiles"  # where the wheel puts them; a checkout has one source of them
    directory = installed if installed.is_dir() else Path(__file__).parents[1] / "launch" / "profiles"
    return {path.stem: read_profile(path) for path in sorted(directory.glob("*.toml"))}


def shipped_profile(name: str) -> ProfileFile:
    """A shipped profile by name. Raises UsageError for an unknown one."""
    known = shipped_profiles()
    if name not in known:
        raise UsageError(f"unknown profile '{name}'.{nearest(name, known)} Known: {', '.join(known)}.")
    return known[name]


def vllm_arguments(table: Mapping[str, Any]) -> list[list[str]]:
    """A [vllm] table as vLLM's arguments, one list a key: {"max-num-seqs": 64} -> [["--max-num-seqs", "64"]]."""
    import json

    arguments = []
    for key, value in table.items():
        name = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            arguments.append([name if value else "--no-" + name[2:]])
        elif isinstance(value, dict):
            arguments.append([name, json.dumps(value)])
        elif isinstance(value, list):
            arguments.append([name, *map(str, value)])
        else:
            arguments.append([name, str(value)])
    return arguments


VLLM_SHORT = {
    "-ac": "--attention-config", "-asc": "--api-server-count", "-cc": "--compilation-config",
    "-dp": "--data-parallel-size", "-n": "--nnodes", "-pp": "--pipeline-parallel-size", "-q": "--quantization",
    "-r": "--node-rank", "-sc": "--speculative-config", "-tp": "--tensor-parallel-size",
}  # fmt: skip
"""vLLM's short flags that are read here or refused; -O besides."""


def argument_name(argument: str) -> str | None:
    """The name of a vLLM flag as vLLM reads it, or None for a value: --max_num_seqs=4 -> --max-num-seqs.

    A short flag has its long name; --some-config.key names --some-config, whose whole JSON vLLM makes of such keys.
    """
    name = argument.partition("=")[0].partition(".")[0].replace("_", "-")
    return VLLM_SHORT.get(name, name) if argument.startswith("-") else None


def given_flags(arguments: tuple[str, ...]) -> dict[str, str]:
    """vLLM's flags in its arguments, with the value that follows each ("" for a switch); the last one counts.

    --no-some-switch takes --some-switch out again.
    """
    given = {}
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        if name := argument_name(argument):
            given[name] = argument.partition("=")[2] if "=" in argument else following
            if name.startswith("--no-"):
                given.pop("--" + name.removeprefix("--no-"), None)
    return given


def given_words(arguments: tuple[str, ...], name: str) -> list[str]:
    """The words that follow the last `name` among vLLM's arguments, for a flag that takes several."""
    words: list[str] = []
    taken = False
    for argument in arguments:
        if found := argument_name(argument):
            taken = found == name
            words = argument.split("=")[1:] if taken else words
        elif taken:
            words.append(argument)
    return words


def counted_flag(profile: Profile, flag: str, what: str) -> int:
    """A flag of vLLM's that is a number from 1 up, 1 where it is not given. Raises UsageError."""
    text = given_flags(profile.vllm).get(flag, "1")
    if not text.isdecimal() or int(text) == 0:
        raise UsageError(f"{flag} {text}: it is a number of {what}, 1 or more.")
    return int(text)


def nodes(profile: Profile) -> int:
    """Machines that a replica runs on: vLLM's --nnodes. Raises UsageError where it is no number from 1 up."""
    return counted_flag(profile, "--nnodes", "machines")


def data_parallel(profile: Profile) -> int:
    """Copies of the model, each with its own sequences and KV cache: vLLM's --data-parallel-size. Raises UsageError."""
    return counted_flag(profile, "--data-parallel-size", "replicas")


def workers(profile: Profile) -> int:
    """GPUs of a launch: of each layer, by the groups of layers, by the copies. Raises UsageError."""
    return profile.tp * profile.pp * data_parallel(profile)


def local_workers(profile: Profile) -> int:
    """GPUs of a launch on each of its machines. Raises UsageError."""
    return math.ceil(workers(profile) / nodes(profile))


@dataclass(frozen=True)
class Resolved:
    """A profile, and where each of its values came from."""

    profile: Profile
    sources: dict[str, str]
    files: tuple[ProfileFile, ...] = ()

    @property
    def hardware(self) -> Hardware:
        """What the last file that says so was made for; nothing where its split or precision is not what is served."""
        for file in reversed(self.files):
            if file.hardware.gpus:
                own = [name for name in ("tp", "pp", "quantization") if name in file.values]
                return file.hardware if all(self.sources[name] == file.name for name in own) else Hardware()
        return Hardware()


def resolve(
    flags: Mapping[str, str] | None = None,
    environ: Mapping[str, str] = os.environ,
    profile_files: tuple[ProfileFile, ...] = (),
    vllm: tuple[str, ...] = (),
) -> Resolved:
    """The profile that flags, QVQ_* variables, files (later ones win) and defaults make together.

    `flags` has texts by field name; `vllm` is what follows `--`. Raises UsageError for what cannot be.
    """
    values: dict[str, Any] = {f.name: f.default for f in OPTIONS if f.default is not MISSING}
    sources = dict.fromkeys(values, "default")
    table: dict[str, Any] = {}
    for file in profile_files:
        values |= file.values
        sources |= dict.fromkeys(file.values, str(file.name))
        table |= file.vllm
    for name in NAMES:
        if (text := environ.get(variable(name))) is not None:
            values[name], sources[name] = convert(name, text, variable(name)), variable(name)
    for name, text in (flags or {}).items():
        values[name], sources[name] = convert(name, text, flag(name)), flag(name)
    given = {argument_name(argument) for argument in vllm}
    from_files = [a for argument in vllm_arguments(table) if argument_name(argument[0]) not in given for a in argument]
    return Resolved(Profile(**values, vllm=(*from_files, *vllm)), sources, profile_files)
