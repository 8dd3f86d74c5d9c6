"""The command line. Standard library only at import; no command imports more than it needs: --help answers at once."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from qvq_serve import __version__
from qvq_serve.errors import EXIT_DOES_NOT_FIT, EXIT_START, QvqError, UsageError, nearest
from qvq_serve.profile import NAMES, OPTIONS, flag, option_type, variable

if TYPE_CHECKING:
    from qvq_serve.gpu import Gpu
    from qvq_serve.profile import ProfileFile, Resolved

EPILOG = (
    "precedence: flag > QVQ_* variable (--max-images is QVQ_MAX_IMAGES) > --config file > --profile > default.\n"
    "What follows -- goes to vLLM unchanged: qvq-serve --tp 4 -- --max-num-seqs 64"
)
CHOOSES_MODEL = ("model", "tp", "pp", "quantization")
"""Whoever gives one of these has chosen what to serve; otherwise the machine's GPUs choose a profile."""


class Parser(argparse.ArgumentParser):
    """argparse, with errors that name the nearest known flag and do not print the usage."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            unknown = message.split(": ", 1)[1].split()[0]
            known = [name for action in self._actions for name in action.option_strings]
            near = nearest(unknown, known)
            last = "; the server's come after LEADER" if self.prog.endswith(" node") else ""
            raise UsageError(f"unknown argument '{unknown}'.{near} `{self.prog} --help` lists them{last}.")
        raise UsageError(f"{message}.")


def counted(most: int = 10**9) -> Callable[[str], int]:
    """argparse's type of a whole number from 1 to `most`."""

    def read(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 to {most}")
        return int(text)

    return read


def server_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of what is served: Profile's fields, and the files that give them."""
    parser.add_argument("--profile", metavar="NAME", help="settings of launch/profiles; `--profile list` lists them")
    parser.add_argument("--config", metavar="FILE", help="a TOML file of settings like a profile's")
    parser.add_argument("--demo", action="store_true", help="serve the built-in demo model: --profile demo")
    for option in OPTIONS:
        kind = option_type(option.name)
        metavar = option.metadata["metavar"] or {int: "N", float: "X"}.get(kind, "TEXT")
        default = "" if option.default is None or option.name == "system_prompt" else f" (default {option.default})"
        text = (option.metadata["help"] + default).replace("%", "%%")
        parser.add_argument(flag(option.name), dest=option.name, metavar=metavar, help=text)
    parser.add_argument("--print-config", action="store_true", help="print each value with its source, and stop")


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of `qvq-serve`, and those of its commands by name."""
    parser = Parser(
        prog="qvq-serve",
        description="Serve QVQ-72B-Preview on vLLM.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qvq-serve {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    made = {}

    def add(name: str, help: str, run: Callable[[argparse.Namespace], int]) -> Parser:
        made[name] = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=EPILOG,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made[name].set_defaults(run=run)
        made[name].add_argument("--debug", action="store_true", help="show the traceback of an error")
        return made[name]

    serve = add("serve", "start the server (implied: `qvq-serve --tp 4`)", run_serve)
    server_flags(serve)
    serve.add_argument("--dry-run", action="store_true", help="print what vLLM would be given, and start nothing")
    serve.add_argument("--force", action="store_true", help="start against what `check` refuses")

    node = add("node", "start one machine of a replica that runs on several: launch/multinode", run_node)
    node.usage = "qvq-serve node [-h] [--heartbeat-port N] [--join-timeout SECONDS] RANK NODES LEADER [FLAGS OF SERVE]"
    node.add_argument(
        "--heartbeat-port", type=counted(65535), default=29502, metavar="N", help="of node 0 (default %(default)s)"
    )
    node.add_argument(
        "--join-timeout", type=counted(), default=600, metavar="SECONDS", help="until all nodes are there (default 600)"
    )
    node.add_argument("rank", type=int, metavar="RANK", help="0 for the machine with the API; 1, 2, ... for the others")
    node.add_argument("nodes", type=int, metavar="NODES", help="machines of the replica")
    node.add_argument("leader", metavar="LEADER", help="address of node 0")
    flags = node.add_argument(
        "flags", nargs=argparse.REMAINDER, metavar="FLAGS", help="serve's, the same on each machine"
    )
    flags.required = False

    plan = add("plan", "what fits, before anything is loaded: GPU memory by use; exit code 4 if it does not", run_plan)
    server_flags(plan)
    plan.add_argument("--gpu", metavar="NAME|GiB", help="h100, h200, a100-80gb, ...; default: this machine's")
    plan.add_argument("--num-gpus", type=counted(), metavar="N", help="how many (default: those needed, or there)")
    plan.add_argument(
        "--typical-output", type=counted(), default=2048, metavar="N", help="output tokens of a typical request"
    )
    plan.add_argument("--fit", action="store_true", help="choose model, tp, quantization and KV cache for the cards")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.add_argument("--values", action="store_true", help="print what Kubernetes must know, as values of the chart")

    server_flags(add("check", "refuse what cannot work on this machine, before the minutes of loading", run_check))

    download = add(
        "download", "bring a model's weights from ModelScope or Hugging Face: resumable, verified", run_download
    )
    download.add_argument("--model", default="qvq-72b", metavar="NAME", help="known name (default qvq-72b)")
    download.add_argument("--to", metavar="DIR", help="where to put it (default: where --model NAME looks for it)")
    how = download.add_mutually_exclusive_group()
    how.add_argument("--source", choices=("modelscope", "huggingface"), help="default: the first that has it")
    how.add_argument("--wait", action="store_true", help="bring nothing: wait until another download has done it")

    ask = add("ask", "ask a running server one question, streamed: reasoning dimmed, answer bright", run_ask)
    ask.add_argument("images", nargs="*", metavar="IMAGE", help="files or https URLs")
    ask.add_argument("question", metavar="QUESTION")
    ask.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default %(default)s)")
    ask.add_argument("--api-key", metavar="KEY", help="the server's key; or QVQ_API_KEY")
    ask.add_argument(
        "--max-tokens", type=counted(), default=2048, metavar="N", help="output tokens (default %(default)s)"
    )
    return parser, made


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. An error is one or two lines on stderr."""
    if argv is None:
        hide_key()
        argv = sys.argv[1:]
    arguments, vllm = split(list(argv))
    debug = "--debug" in arguments
    try:
        return dispatch(arguments, tuple(vllm))
    except QvqError as error:
        if debug:
            raise
        print(f"qvq-serve: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("qvq-serve: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.filename:  # rights, a disk, a network's file system
            print(f"qvq-serve: {error.filename}: {error.strerror}.", file=sys.stderr)
            return EXIT_START
        print(f"qvq-serve: a fault of ours: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
        return 1


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Our arguments, and what follows `--`."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def dispatch(arguments: list[str], vllm: tuple[str, ...]) -> int:
    """Parse and run one command; `serve` where none is named."""
    parser, commands = build_parser()
    first = arguments[0] if arguments else "--"
    if first not in commands and first not in ("-h", "--help", "--version"):
        if not first.startswith("-"):
            raise UsageError(f"unknown command '{first}'.{nearest(first, commands)} Known: {', '.join(commands)}.")
        arguments = ["serve", *arguments]
    if not arguments or arguments[0] not in commands:
        parser.parse_args(arguments)
    known = commands[arguments[0]].parse_args(arguments[1:])
    if vllm and arguments[0] not in ("serve", "node", "check", "plan"):
        raise UsageError(f"`qvq-serve {arguments[0]}` starts no vLLM, so nothing can follow --.")
    known.vllm = vllm
    if getattr(known, "profile", None) == "list":
        return print_profiles()
    if getattr(known, "print_config", False):
        return print_config(chosen(known, pick=arguments[0] != "plan")[0])
    run: Callable[[argparse.Namespace], int] = known.run
    return run(known)


def hide_key() -> None:
    """A key on the command line is in every process list: hand it to ourselves in the environment, and start again."""
    line = sys.orig_argv[1:]
    secret = {flag(option.name): variable(option.name) for option in OPTIONS if option.metadata["secret"]}
    for at, argument in enumerate(line):
        if argument == "--":
            return
        name, equals, key = argument.partition("=")
        if name not in secret or not (equals or (at + 1 < len(line) and not line[at + 1].startswith("-"))):
            continue
        key, rest = (key, line[at + 1 :]) if equals else (line[at + 1], line[at + 2 :])
        os.execve(sys.executable, [sys.executable, *line[:at], *rest], os.environ | {secret[name]: key})


def chosen(arguments: argparse.Namespace, pick: bool = True) -> tuple["Resolved", list["Gpu"]]:
    """The profile that flags, variables, files and, where nothing says what to serve, this machine's GPUs make.

    With `pick` false, the GPUs choose nothing.
    """
    from pathlib import Path

    from qvq_serve.gpu import visible_gpus
    from qvq_serve.profile import read_profile, resolve, shipped_profile

    name = arguments.profile or os.environ.get("QVQ_PROFILE")
    if arguments.demo and name not in (None, "demo"):
        raise UsageError(f"--demo and --profile {name} are both given; leave one of them out.")
    given = {name: getattr(arguments, name) for name in NAMES if getattr(arguments, name) is not None}
    gpus = [] if getattr(arguments, "gpu", None) else visible_gpus()
    own = [read_profile(Path(arguments.config))] if arguments.config else []
    if arguments.demo:
        name = "demo"
    elif (
        pick
        and not name
        and not any(key in given or variable(key) in os.environ for key in CHOOSES_MODEL)
        and not any(key in file.values for file in own for key in CHOOSES_MODEL)
    ):
        name = fitting(gpus)
    files = [shipped_profile(name)] if name else []
    files += own
    warn_of_variables()
    return resolve(given, os.environ, tuple(files), arguments.vllm), gpus


def fitting(gpus: list["Gpu"]) -> str:
    """The name of the profile for these GPUs, said on stderr. Raises UsageError where none is made for them."""
    if not gpus:
        say("no NVIDIA GPU is visible, so this serves the built-in demo model; --help says how to serve QVQ")
        return "demo"
    least = min(gpu.memory_gib for gpu in gpus)
    best = made_for(len(gpus), least)
    if not best:
        raise UsageError(
            f"no profile is made for {len(gpus)} x {gpus[0].name} ({least:.0f} GiB); choose with --profile, --model "
            "and --tp (`qvq-serve --profile list`), or `qvq-serve --demo`."
        )
    untested = "" if best.verified else "; untested"
    say(f"--profile {best.name} is chosen for {len(gpus)} x {gpus[0].name}: {best.description}{untested}")
    return best.name


def made_for(gpus: int, gib: float) -> "ProfileFile | None":
    """The shipped profile for cards of so many GiB: of the highest precision, then for the most and the largest."""
    from qvq_serve.profile import shipped_profiles

    fits = [p for p in shipped_profiles().values() if 0 < p.hardware.gpus <= gpus and p.hardware.gpu_gib <= gib]
    return max(
        fits,
        key=lambda p: (p.name.endswith("bf16"), p.name.endswith("fp8"), p.hardware.gpus, p.hardware.gpu_gib),
        default=None,
    )


def warn_of_variables() -> None:
    """A QVQ_* variable that nothing reads is likely a slip; Kubernetes sets some too, so it is no error."""
    known = [variable(name) for name in NAMES] + [
        "QVQ_PROFILE",
        "QVQ_CACHE",
        "QVQ_TORCH_INDEX",
        "QVQ_PYTHON",
        "QVQ_EXTRA",
    ]
    for name in os.environ:
        if name.startswith("QVQ_") and name not in known:
            say(f"the variable {name} is not known, and ignored.{nearest(name, known)}")


def say(text: str) -> None:
    """A line for the person at the terminal, apart from what a command prints."""
    print(f"qvq-serve: {text}", file=sys.stderr, flush=True)


def print_profiles() -> int:
    """The shipped profiles, each with what it was made for, and whether it was run."""
    from qvq_serve.profile import shipped_profiles

    for name, file in shipped_profiles().items():
        needs = f"{file.hardware.gpus} x {file.hardware.name}" if file.hardware.gpus else "no GPU"
        but = f"; but {file.differs}" if file.differs else ""
        proof = f"verified: {file.verified}{but}" if file.verified else "untested"
        print(f"{name:22}{needs:16}{proof:10}  {file.description}")
    return 0


def print_config(resolved: "Resolved") -> int:
    """Each value with its source; a secret only as given or not."""
    for option in OPTIONS:
        value = getattr(resolved.profile, option.name)
        shown = "(given)" if option.metadata["secret"] and value is not None else repr(value)
        print(f"{option.name:24}{shown:40}  {resolved.sources[option.name]}")
    print(f"{'vllm':24}{' '.join(resolved.profile.vllm)}")
    return 0


def run_serve(arguments: argparse.Namespace) -> int:
    """`serve`: choose, refuse what cannot be, bring what is missing, and serve until told to stop."""
    resolved, gpus = chosen(arguments)
    from qvq_serve import engine, interrupt, preflight
    from qvq_serve.memory import queue_limit
    from qvq_serve.model import KNOWN, locate, missing_files
    from qvq_serve.profile import given_flags

    profile = resolved.profile
    if arguments.dry_run:
        preflight.check_usage(resolved)
        # Where this machine has no GPU, a model that needs them is shown as on one that has.
        queued = queue_limit(profile, gpus) if gpus or profile.model not in KNOWN else None
        print(engine.command(profile, gpus=len(gpus) or (profile.model in KNOWN), queued=queued))
        return 0
    interrupt.end_at_once()
    for passed_over in preflight.check_start(resolved, gpus, arguments.force):
        say(f"--force goes on against this: {passed_over}")
    launch = engine.command(profile, gpus=len(gpus), queued=queue_limit(profile, gpus))
    made_up = given_flags(profile.vllm).get("--load-format") == "dummy"
    if profile.model in KNOWN and not made_up and missing_files(locate(profile.model)):
        from qvq_serve.download import download

        engine.rehearse(profile, launch.argv)  # a slip is said before 147 GB come
        download(profile.model)
    preflight.check_model(profile)
    for name, reason in launch.reasons.items():
        say(f"{name}: {reason}")
    if profile.host not in ("127.0.0.1", "localhost", "::1") and engine.API_KEY_VARIABLE not in launch.secrets:
        say(f"--host {profile.host} is open to the network, and no --api-key is set")
    say(f"starting {engine.served_name(profile)} at http://{profile.host}:{profile.port}/v1")
    engine.run(launch)
    return 0


def run_node(arguments: argparse.Namespace) -> int:
    """`node`: join the other machines, and serve with them until all end; adds what vLLM must know of them."""
    from qvq_serve.profile import given_flags

    rank, nodes, vllm = arguments.rank, arguments.nodes, arguments.vllm
    if not 0 <= rank < nodes:
        raise UsageError(f"RANK {rank} of NODES {nodes}: machines are numbered from 0 to {nodes - 1}.")
    for name in given_flags(vllm):
        if name in ("--nnodes", "--node-rank", "--master-addr", "--headless"):
            raise UsageError(f"{name} after -- is set by `qvq-serve node` itself; leave it out.")
    added = ["--nnodes", str(nodes), "--node-rank", str(rank), "--master-addr", arguments.leader]
    added += ["--headless"] if rank else []
    serve = build_parser()[1]["serve"].parse_args(arguments.flags)
    if serve.dry_run or serve.print_config or serve.profile == "list":
        return dispatch(["serve", *arguments.flags], (*vllm, *added))
    import asyncio

    from qvq_serve.node import Node
    from qvq_serve.preflight import check_machines

    serve.vllm = vllm
    profile = chosen(serve)[0].profile
    check_machines(profile, nodes)
    settings = {flag(o.name): str(getattr(profile, o.name)) for o in OPTIONS if not o.metadata["secret"]}
    settings |= {"the version": __version__, "NODES": str(nodes), "what follows --": " ".join(profile.vllm)}
    command = [sys.executable, "-m", "qvq_serve", "serve", *arguments.flags, "--", *vllm, *added]
    port, join_timeout = arguments.heartbeat_port, arguments.join_timeout
    return asyncio.run(Node(rank, nodes, arguments.leader, port, command, settings, join_timeout).run())


def run_plan(arguments: argparse.Namespace) -> int:
    """`plan`: GPU memory by use, what fits and what would; exit code 0 if it fits, 4 if not."""
    import json
    from dataclasses import replace

    from qvq_serve import advice, memory
    from qvq_serve.engine import SECRET, refuse_owned
    from qvq_serve.gpu import GIB
    from qvq_serve.model import ModelGeometry
    from qvq_serve.preflight import check_usage
    from qvq_serve.profile import workers

    resolved, gpus = chosen(arguments, pick=False)
    profile = resolved.profile
    refuse_owned(profile.vllm)
    if arguments.values:
        if beside := [flag(name) for name in ("fit", "json", "num_gpus") if getattr(arguments, name)]:
            raise UsageError(f"--values prints the chart's values, for which {beside[0]} means nothing; leave one out.")
        return print_values(resolved, arguments.gpu)
    if arguments.gpu:
        card, size = memory.card_memory(arguments.gpu)
    elif gpus:
        card, size = memory.card_of(min(gpus, key=lambda gpu: gpu.memory_bytes))
    else:
        raise UsageError("no NVIDIA GPU is visible on this machine; --gpu h200 plans for one.")
    num_gpus = arguments.num_gpus or (workers(profile) if arguments.gpu else len(gpus))
    if arguments.fit:
        for name in ("tp", "pp", "quantization", "kv_cache_dtype"):
            if (source := resolved.sources[name]) != "default":
                raise UsageError(f"--fit chooses {flag(name)} itself, and {source} gives it; leave one of them out.")
        check_usage(resolved)  # of one GPU here: all but what is chosen
        made = advice.fit(profile, card, size, num_gpus, arguments.typical_output)
    else:
        check_usage(resolved)
        geometry = ModelGeometry.load(profile.model)
        made = memory.plan(profile, geometry, card, size, num_gpus, arguments.typical_output)
    would_fit = [] if made.fits else advice.suggestions(made)
    if arguments.json:
        print(json.dumps(memory.as_json(made, would_fit)))
        return 0 if made.fits else EXIT_DOES_NOT_FIT
    print(memory.as_table(made, would_fit))
    if arguments.fit:
        if file := made_for(num_gpus, size / GIB):
            print(f"\na shipped profile for these cards, which may have more room: --profile {file.name}", end="")
        given = {name for name in NAMES if resolved.sources[name] != "default"} - {*SECRET}
        shown = [name for name in NAMES if name in {*advice.FITTED, *given}]
        fields = {name: getattr(made.profile, name) for name in shown}
        print(f"\nqvq-serve {advice.flags_of(fields | {'vllm': profile.vllm}, replace(profile, vllm=()))}".rstrip())
    return 0 if made.fits else EXIT_DOES_NOT_FIT


def print_values(resolved: "Resolved", gpu: str | None) -> int:
    """`plan --values`: for the GPUs of --gpu, or those that the profile was made for.

    Raises UsageError without any, and DoesNotFit.
    """
    from qvq_serve import kubernetes, memory
    from qvq_serve.model import DEMO, ModelGeometry
    from qvq_serve.preflight import check_memory, check_usage
    from qvq_serve.profile import workers

    if not gpu and not resolved.hardware.gpus and resolved.profile.model != DEMO:
        raise UsageError(
            "the profile has no [hardware], or not for this split and precision, so --values needs a card: --gpu h100, "
            "for example."
        )
    check_usage(resolved)
    profile = resolved.profile
    if profile.model != DEMO:
        card, size = memory.card_memory(gpu or str(resolved.hardware.gpu_gib))
        check_memory(memory.plan(profile, ModelGeometry.load(profile.model), card, size, workers(profile)))
    print(kubernetes.as_values(kubernetes.figures(resolved, gpu)))
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    """`check`: all that a start would refuse; exit code 0 where it would go on to load."""
    resolved, gpus = chosen(arguments)
    from qvq_serve import engine, preflight
    from qvq_serve.hooks import chain

    preflight.check_start(resolved, gpus)  # in the order of a start
    launch = engine.command(resolved.profile, gpus=len(gpus))
    chain.load(resolved.profile)
    preflight.check_model(resolved.profile)
    if resolved.profile.vllm:  # vLLM's imports take seconds
        engine.parse(launch.argv)
    print("nothing stands against a start")
    return 0


def run_download(arguments: argparse.Namespace) -> int:
    """`download`: weights onto this disk; the last line is the directory."""
    from qvq_serve import interrupt
    from qvq_serve.download import download, wait

    interrupt.end_at_once()  # Hugging Face's threads would end their files first
    print(
        wait(arguments.model, arguments.to)
        if arguments.wait
        else download(arguments.model, arguments.source, arguments.to)
    )
    return 0


def run_ask(arguments: argparse.Namespace) -> int:
    """`ask`: one question, streamed to the terminal."""
    from qvq_serve.ask import ask

    key = arguments.api_key or os.environ.get(variable("api_key"))
    ask(arguments.url, arguments.images, arguments.question, api_key=key, max_tokens=arguments.max_tokens)
    return 0
