"""The hooks of a server, loaded once and run in their order; each call has a time limit, and a failure a name."""

import asyncio
import logging
import os
import sys
import time
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from qvq_serve import metrics
from qvq_serve.engine import launched_profile
from qvq_serve.errors import UsageError
from qvq_serve.hooks import Answer, Context, Hook, Part, Refuse, Stop
from qvq_serve.hooks.answer import BoxedAnswer
from qvq_serve.hooks.governing import Governing
from qvq_serve.hooks.language import Languages
from qvq_serve.hooks.request import RequestDefaults
from qvq_serve.profile import Profile

log = logging.getLogger("vllm.qvq_serve")
GROUP = "qvq_serve.hooks"
STAGES = ("before", "on_image", "on_text", "after")


class HookFailed(Exception):
    """A hook raised or took too long; the request fails, with the hook's name."""


class Chain:
    """All hooks of a server; a stage that no hook overrides costs nothing."""

    def __init__(self, hooks: Sequence[Hook], timeout: float) -> None:
        self.timeout = timeout
        self.stages = {
            stage: [hook for hook in hooks if getattr(type(hook), stage) is not getattr(Hook, stage)]
            for stage in STAGES
        }

    async def before(self, context: Context) -> None:
        await self.run("before", context)

    async def on_image(self, context: Context, index: int, image: Any) -> None:
        await self.run("on_image", context, index, image)

    async def on_text(self, context: Context, choice: int, part: Part, text: str) -> None:
        await self.run("on_text", context, choice, part, text)

    async def after(self, context: Context, answer: Answer) -> None:
        await self.run("after", context, answer)

    async def run(self, stage: str, *arguments: Any) -> None:
        """Call a stage of each hook in turn. Raises Refuse, Stop, or HookFailed."""
        for hook in self.stages[stage]:
            started = time.perf_counter()
            limit = asyncio.timeout(self.timeout)
            try:
                async with limit:
                    await getattr(hook, stage)(*arguments)
            except (Refuse, Stop):
                raise
            except Exception as error:
                metrics.HOOK_FAILURES.labels(hook.name).inc()
                reason = f"took longer than {self.timeout:g} s" if limit.expired() else f"raised {error!r}"
                log.error("hook %s, %s: %s", hook.name, stage, reason, exc_info=None if limit.expired() else error)
                raise HookFailed(f"the server's hook {hook.name} failed ({stage})") from None
            finally:
                metrics.HOOK_SECONDS.labels(hook.name, stage).observe(time.perf_counter() - started)


@cache
def launched() -> Chain:
    """The hooks of this server, made once in each process. Raises UsageError."""
    profile = launched_profile()
    return Chain(load(profile), profile.hook_timeout)


def load(profile: Profile) -> list[Hook]:
    """The hooks of a profile, in their order. Raises UsageError for one that is not there or cannot be made."""
    from qvq_serve.hooks.safety import Guard

    classes: list[Any] = [BoxedAnswer, Languages, *([Guard] if profile.guard_url else [])]
    classes += [imported(path) for path in names(profile.hook)]
    classes += [loaded(entry) for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)]
    classes += [RequestDefaults, Governing]  # budgets are worked out from what the others leave of a request
    without = names(profile.without_hooks)
    hooks = []
    for made in classes:
        if not (isinstance(made, type) and issubclass(made, Hook)):
            raise UsageError(f"--hook: {made!r} is no class that derives from qvq_serve.hooks.Hook.")
        name = made.name or made.__name__
        if name in without:
            without.remove(name)
            continue
        try:
            hook = made(profile)
        except Exception as error:
            raise UsageError(f"the hook {name} cannot be made: {error!r}.") from error
        hook.name = name
        hooks.append(hook)
    if without:
        known = ", ".join(made.name or made.__name__ for made in classes)
        raise UsageError(f"--without-hooks {without[0]}: there is no such hook; there are {known}.")
    return hooks


def names(text: str | None) -> list[str]:
    """The names in a list with commas."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def imported(path: str) -> Any:
    """What "package.module:Class" names. Raises UsageError where it is not there."""
    module, _, name = path.partition(":")
    if not name:
        raise UsageError(f"--hook {path}: package.module:Class is expected.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a module beside the user, as uvicorn takes one
    try:
        return getattr(import_module(module), name)
    except Exception as error:
        raise UsageError(f"--hook {path} cannot be imported: {error!r}.") from error


def loaded(entry: Any) -> Any:
    """The class of an entry point. Raises UsageError where it cannot be imported."""
    try:
        return entry.load()
    except Exception as error:
        raise UsageError(f"the hook {entry.name} ({entry.value}) cannot be imported: {error!r}.") from error
