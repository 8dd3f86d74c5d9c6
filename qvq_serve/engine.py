"""Profile -> environment and argv of `vllm serve` -> vLLM's own parser -> vLLM's own server, in this process.

Everything down to `run` is pure and imports no vLLM, so that --dry-run, check and the tests see what a start does.
"""

import argparse
import json
import os
import re
import shlex
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from qvq_serve import visual
from qvq_serve.errors import QvqError, StartError, UsageError, nearest
from qvq_serve.memory import ALLOCATOR_VARIABLES, expandable_segments, told_allocator
from qvq_serve.model import DEMO, KNOWN, locate
from qvq_serve.profile import OPTIONS, Profile, argument_name, flag, given_flags, local_workers

CHAT_TEMPLATE = Path(__file__).parent / "chat_template.jinja"
CONNECTOR = PARSER = "qvq"
PLUGIN = "qvq_serve"
API_KEY_VARIABLE = "QVQ_LAUNCHED_API_KEY"
GUARD_KEY_VARIABLE = "QVQ_LAUNCHED_GUARD_KEY"
SECRET = [f.name for f in OPTIONS if f.metadata["secret"]]
PROFILE_VARIABLE = "QVQ_LAUNCHED_PROFILE"
"""The profile as JSON, without the key, for the processes that vLLM starts. Not --additional-config, which vLLM hashes
into its compile cache's key: a changed limit would compile again."""

# vLLM's flags that are ours to set, and the flag of ours that sets each; synonyms as well.
OWNED = {f.metadata["vllm"]: flag(f.name) for f in OPTIONS if f.metadata["vllm"]} | {
    "--model": "--model",
    "--device-memory-utilization": "--gpu-memory-utilization",
    "--served-model-name": "--served-model-name",
    "--api-key": "--api-key",
    "--config": "--config",
    "--worker-extension-cls": None,
    "--generation-config": "--temperature",
    "--override-generation-config": "--temperature",
    "--limit-mm-per-prompt": "--max-images",
    "--mm-processor-kwargs": "--max-visual-tokens",
    "--chat-template": "--system-prompt",
    "--default-chat-template-kwargs": "--system-prompt",
    "--allowed-media-domains": "--allowed-image-hosts",
    "--reasoning-parser": None,
    "--api-server-count": None,
    "--disable-uvicorn-access-log": None,
    "--logging-config": "--log-format",
    "--sse-keep-alive-interval": "--keep-alive",
    "--structured-outputs-config": None,
    "--reasoning-config": "--thinking-budget",
    # Other servers than the one that our keys, limits and drain stand before.
    "--grpc": None,
    "--grpc-port": None,
    "--data-parallel-multi-port-external-lb": None,
    "--device-ids": "CUDA_VISIBLE_DEVICES",  # which the checks, the plan and the metrics follow
}
OTHER_SERVERS = {
    "VLLM_USE_RUST_FRONTEND": "serves without keys, limits and drain",
    "VLLM_API_KEY": "is asked for behind qvq-serve's own key, so that nobody gets in; give QVQ_API_KEY",
}
"""Variables of vLLM's, and what is wrong with each."""


@dataclass(frozen=True)
class Command:
    """What a launch gives vLLM: environment variables, `vllm serve`'s arguments, and the reasons of derived ones."""

    environment: dict[str, str]
    argv: list[str]
    reasons: dict[str, str]
    secrets: dict[str, str] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        """Shell lines that start the same server, each derived value with its reason; a key is never shown."""
        lines = [f"# {name}: {reason}" for name, reason in self.reasons.items()]
        lines += [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]
        lines += [f"export {name}=...  # set, and not shown" for name in self.secrets]
        return "\n".join([*lines, shlex.join(["vllm", "serve", *self.argv])])


def command(profile: Profile, *, gpus: int, cpus: list[int] | None = None, queued: int | None = None) -> Command:
    """The launch of a profile on a machine with `gpus` GPUs, or, with none, on the given cores of its CPU.

    `queued` requests may run or wait, where the profile does not say.

    Raises UsageError where an argument after `--` is one of ours, or a CPU has fewer cores than workers.
    """
    refuse_owned(profile.vllm)
    refuse_speculation(profile, gpus)
    least, most = visual.pixels(profile.min_visual_tokens), visual.pixels(profile.max_visual_tokens)
    limits = {"image": profile.max_images, "video": 0}
    sizes = {"size": {"shortest_edge": least, "longest_edge": most}}
    sampling = {"temperature": profile.temperature, "top_p": profile.top_p, "top_k": profile.top_k}
    derived: list[tuple[str, Any, str]] = [
        ("--generation-config", "vllm", "the checkpoint's own sampling is next to greedy, which feeds its loops"),
        (
            "--override-generation-config",
            sampling | {"max_new_tokens": profile.max_output_tokens},
            "sampling where a request does not say, and the most that it may write",
        ),
        ("--served-model-name", served_name(profile), "the name that clients ask for"),
        (
            "--limit-mm-per-prompt",
            limits,
            f"{profile.max_images} images a request; no video, or vLLM would profile one of 16384 tokens",
        ),
        (
            "--mm-processor-kwargs",
            sizes,
            f"{profile.min_visual_tokens} to {profile.max_visual_tokens} visual tokens an image, in pixels",
        ),
        ("--chat-template", str(CHAT_TEMPLATE), "QVQ's template, with the system prompt as a variable"),
        ("--reasoning-parser", PARSER, "tells QVQ's reasoning from its answer (qvq_serve/hooks/reasoning.py)"),
        ("--middleware", "qvq_serve.api.door.Door", "keys, closed routes, body size, drain (qvq_serve/api/door.py)"),
        (
            "--structured-outputs-config",
            {"enable_in_reasoning": True},
            "our grammars describe the reasoning too (qvq_serve/hooks/request.py)",
        ),
        (
            "--worker-extension-cls",
            "qvq_serve.worker.WorkerFigures",
            "each worker tells of its memory and governor",
        ),
        (
            "--default-chat-template-kwargs",
            {"system_prompt": profile.system_prompt},
            "added where a request brings no system message",
        ),
    ]
    argv = [str(locate(profile.model))]
    for option in OPTIONS:
        value = getattr(profile, option.name)
        if option.metadata["vllm"] and value is not None:
            argv += [option.metadata["vllm"], str(value)]
    for name, value, _ in derived:
        argv += [name, json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value]
    reasons = {name: reason for name, _, reason in derived}
    if profile.governor != "off":
        argv += ["--logits-processors", f"qvq_serve.governor.{'v2:GovernorV2' if gpus else 'v1:GovernorV1'}"]
        reasons["--logits-processors"] = "the governor, for the runner that vLLM has on " + ("GPUs" if gpus else "CPUs")
    if "--headless" not in given_flags(profile.vllm):  # the other machines of a replica have no API
        argv += ["--api-server-count", "1"]  # with more, a drain and the count of requests would each be half of it
    argv.append("--disable-uvicorn-access-log")  # the door logs each request, with its id
    if profile.log_format == "json" or (profile.log_format == "auto" and not sys.stderr.isatty()):
        argv += ["--logging-config", json.dumps({"formatter": "json"})]
    if profile.max_queued_requests is None and queued is not None:
        argv += ["--max-num-queued-reqs", str(queued)]
        reasons["--max-num-queued-reqs"] = "twice the typical requests that the memory plan has room for"

    # The model is a local directory: nothing is asked of a hub, and nothing is reported to one.
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_MEDIA_CONNECTOR": CONNECTOR}
    environment["VLLM_PLUGINS"] = ",".join(plugin_names())
    reasons["VLLM_PLUGINS"] = "vLLM loads our endpoint plugin only where it is named, and then only what is named"
    reasons["VLLM_MEDIA_CONNECTOR"] = "our connector: image time limit, shapes and errors (qvq_serve/hooks/images.py)"
    workers = local_workers(profile)
    if not gpus and workers > 1:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = bind_threads(workers, cpus or sorted(os.sched_getaffinity(0)))
        reasons["VLLM_CPU_OMP_THREADS_BIND"] = f"{workers} workers share the cores of this CPU"
    if gpus:
        environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        reasons["CUDA_DEVICE_ORDER"] = "cards are numbered as the driver numbers them, and as they were checked"
    if gpus and not told_allocator() and expandable_segments(profile):
        environment[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
        reasons[ALLOCATOR_VARIABLES[0]] = "less of a card is lost to fragments (of an H200 1.1 GB, not 3.4)"
    resolved = replace(profile, max_queued_requests=profile.max_queued_requests or queued)
    environment[PROFILE_VARIABLE] = json.dumps({k: v for k, v in asdict(resolved).items() if k not in SECRET})
    secrets = {API_KEY_VARIABLE: profile.key(), GUARD_KEY_VARIABLE: profile.guard_api_key}
    return Command(environment, [*argv, *profile.vllm], reasons, {name: key for name, key in secrets.items() if key})


def plugin_names() -> list[str]:
    """The plugins that vLLM is to load: those that VLLM_PLUGINS names, or all that are installed, and ours."""
    from importlib.metadata import entry_points

    if (named := os.environ.get("VLLM_PLUGINS")) is not None:
        return sorted({*filter(None, named.split(",")), PLUGIN})
    groups = ("general", "platform", "io_processor", "stat_logger", "endpoint")
    return sorted({e.name for group in groups for e in entry_points(group=f"vllm.{group}_plugins")} | {PLUGIN})


def served_name(profile: Profile) -> str:
    """The model's name in the API: as given, else the repository's of a known name, else the directory's."""
    if profile.served_model_name:
        return profile.served_model_name
    if known := KNOWN.get(profile.model):
        return known.repo
    return "qvq-demo" if profile.model == DEMO else Path(profile.model).resolve().name


def refuse_owned(arguments: tuple[str, ...]) -> None:
    """Raises UsageError where vLLM's own arguments set what a flag of ours sets: two values would contradict."""
    for argument in arguments:
        name = (argument_name(argument) or "").replace("--no-", "--", 1)
        if name in OWNED:
            ours = OWNED[name]
            reason = f"set by qvq-serve's own {ours}; give that instead" if ours else "used by qvq-serve itself"
            raise UsageError(f"{argument} after -- is {reason}.")
        # Python's parsers take -qfp8 and, for -tp, -t.
        if re.match("-[A-NP-Za-z]", argument) and not name.startswith("--"):
            raise UsageError(f"{argument} after -- is not taken in short; write the long form of vLLM's flag.")
    if arguments and not arguments[0].startswith("-"):
        raise UsageError(f"'{arguments[0]}' after --: vLLM's own flags are expected there; --model names the model.")


SPECULATION = {"--speculative-config", "--spec-method", "--spec-model", "--spec-tokens"}


def refuse_speculation(profile: Profile, gpus: int) -> None:
    """Raises UsageError for speculative decoding beside the governor, as other logits processors, and on a CPU."""
    for name in given_flags(profile.vllm):
        if profile.governor != "off" and name in {*SPECULATION, "--logits-processors"}:
            raise UsageError(f"{name} after -- cannot run beside --governor {profile.governor}; leave one of them out.")
        if not gpus and name in SPECULATION:
            raise UsageError(f"{name} after -- needs a GPU: on a CPU vLLM 0.32.0 ends at a first sampled token.")


def bind_threads(workers: int, cpus: list[int]) -> str:
    """The cores of each CPU worker in vLLM's form: 2 workers on cores 0 to 3 -> "0,1|2,3".

    Raises UsageError where there are fewer cores than workers.
    """
    if workers > len(cpus):
        raise UsageError(f"--tp x --pp is {workers}, and this CPU has {len(cpus)} cores for them; lower it.")
    share = len(cpus) // workers
    return "|".join(",".join(map(str, cpus[i * share : (i + 1) * share])) for i in range(workers))


@cache
def launched_profile() -> Profile:
    """The profile of this server, in any process that vLLM started. Raises StartError outside of one."""
    try:
        values = json.loads(os.environ[PROFILE_VARIABLE])
    except KeyError:
        raise StartError(f"{PROFILE_VARIABLE} is not set: qvq-serve's plugin runs only in its own server.") from None
    return Profile(**values | {"vllm": tuple(values["vllm"]), "guard_api_key": os.environ.get(GUARD_KEY_VARIABLE)})


def run(launch: Command) -> None:
    """Serve until told to stop. Raises UsageError for arguments that vLLM refuses, StartError where it cannot start."""
    kept = {name: os.environ[name] for name in GIVE_WAY if name in os.environ}
    os.environ.update(launch.environment | kept | launch.secrets)
    arguments = parse(launch.argv)
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args

    cli_env_setup()
    configure_logging_from_args(arguments)
    prove_plugin()
    from qvq_serve.api import lifecycle
    from qvq_serve.hooks import chain

    chain.launched()  # a hook that cannot be made is said before the model loads
    try:
        validate_parsed_serve_args(arguments)
        ServeSubcommand.cmd(arguments)
        lifecycle.prove_drained()
    except (QvqError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise StartError(f"vLLM stopped: {error or type(error).__name__}") from error


GIVE_WAY = ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS", "VLLM_CPU_OMP_THREADS_BIND", "CUDA_DEVICE_ORDER")
"""Variables of ours that give way to a value set outside."""


def parse(argv: list[str]) -> argparse.Namespace:
    """`vllm serve`'s arguments by vLLM's own parser. Raises UsageError, with the nearest flag, for what it refuses.

    A flag cut short is refused too: --tensor-paral would set what --tp sets. Raises StartError where there is no vLLM.
    """
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError as error:
        raise StartError(
            f"vLLM cannot be imported ({error}); `bash launch/serve.sh` installs it, as does "
            "pip install 'qvq-serve[gpu]' (or [cpu])."
        ) from None

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            hint = ""
            if "unrecognized arguments: " in message:
                hint = nearest(message.split("unrecognized arguments: ")[1].split()[0], self._option_string_actions)
            raise UsageError(f"vLLM refuses its arguments: {message}.{hint}")

    arguments: argparse.Namespace = make_arg_parser(Parser(prog="vllm serve", allow_abbrev=False)).parse_args(argv)
    return arguments


def rehearse(profile: Profile, argv: list[str]) -> None:
    """Make the hooks and parse the arguments, as `run` will, in a process of its own: vLLM reads variables as it is
    imported, and the download before a start needs others. Raises what they raise."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        process.submit(rehearsed, profile, argv).result()


def rehearsed(profile: Profile, argv: list[str]) -> None:
    """What `rehearse` runs; nothing is given back, as it could not be pickled."""
    from qvq_serve.hooks import chain

    chain.load(profile)
    parse(argv)


def prove_plugin() -> None:
    """vLLM drops a plugin that fails with a log line; raises StartError where ours is not in."""
    from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY
    from vllm.plugins import ENDPOINT_PLUGINS_GROUP, load_general_plugins, load_plugins_by_group
    from vllm.reasoning import ReasoningParserManager

    load_general_plugins()
    missing = [] if CONNECTOR in MEDIA_CONNECTOR_REGISTRY.name2class else ["the media connector"]
    missing += [] if PARSER in ReasoningParserManager.list_registered() else ["the reasoning parser"]
    missing += [] if PLUGIN in load_plugins_by_group(ENDPOINT_PLUGINS_GROUP) else ["the endpoint plugin"]
    if missing:
        raise StartError(
            f"vLLM did not load {' and '.join(missing)} of the package qvq-serve; its log above says why. Install the "
            "package again: pip install -e ."
        )
