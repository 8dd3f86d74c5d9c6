"""What a user sees when something cannot be: one or two lines, an exit code, no traceback."""

import difflib
from collections.abc import Iterable

EXIT_USAGE = 2
EXIT_START = 3
EXIT_DOES_NOT_FIT = 4
EXIT_ENGINE_DIED = 5
EXIT_NODE_LOST = 6


class QvqError(Exception):
    """An error whose text is written for the person at the terminal; `exit_code` is the process's."""

    exit_code = 1


class UsageError(QvqError, ValueError):
    """What was asked for cannot be: a flag, a variable, a file or a model that contradicts itself or the others."""

    exit_code = EXIT_USAGE


class StartError(QvqError):
    """What was asked for is sound, but this machine cannot start it now."""

    exit_code = EXIT_START


class DoesNotFit(QvqError):
    """The plan does not fit the cards, or no setting does."""

    exit_code = EXIT_DOES_NOT_FIT


class EngineDied(QvqError):
    """vLLM's engine ended while the server was serving."""

    exit_code = EXIT_ENGINE_DIED


def nearest(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for the known name nearest to `name`, or an empty string where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""
