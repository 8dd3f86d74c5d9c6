"""Hooks: what is done to a request on its way in, and to its text on its way out.

A hook is a class; one instance serves all requests at once, so what belongs to one request goes into its context.
Order: answer, language and guard, those of `--hook` as given, the entry points of the group `qvq_serve.hooks` by name;
then request and governor, which work out budgets from what is left of a request.
"""

import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

    from qvq_serve.profile import Profile

Part = Literal["reasoning", "answer"]
OWN_ANSWER = ("answered", "concluded")
"""Ways to end that leave an answer of the model's own; the tokens of the others are wasted."""


@dataclass
class ImageInfo:
    """An image as it was fetched: size in pixels, and the visual tokens that the model gets of it."""

    width: int
    height: int
    visual_tokens: int


@dataclass
class Context:
    """One request on its way through the server."""

    request: Any
    """vLLM's ChatCompletionRequest, parsed; `before` may change it in place."""
    headers: dict[str, str] = field(default_factory=dict)
    """The request's headers, their names in lower case."""
    started: float = field(default_factory=time.monotonic)
    first_text: float | None = None
    """When the first text came (time.monotonic), or None before it."""
    images: dict[int, ImageInfo] = field(default_factory=dict)
    """The images fetched so far, by their position in the request, from 0."""
    state: dict[str, Any] = field(default_factory=dict)
    """Free for hooks: what one of them keeps from call to call."""


@dataclass
class Answer:
    """One choice of a finished request."""

    index: int
    reasoning: str
    content: str
    """What the client gets as `content`; `after` may replace it where the response is not streamed."""
    ended: str
    """answered, unmarked, concluded, looped, length, timeout, filtered: README, "How a request ended"."""
    qvq: dict[str, Any]
    """The `qvq` object of the response; `after` may add to it."""


class Hook:
    """Override what you need. Each call may refuse or stop; an exception of another kind fails this request alone."""

    name = ""
    """By which metrics, logs and --without-hooks call it; the class's name where it is empty."""

    def __init__(self, profile: "Profile") -> None:
        """Called once, at the start; what it raises stops the start."""

    async def before(self, context: Context) -> None:
        """Before anything is fetched or run: change `context.request`, or raise Refuse."""

    async def on_image(self, context: Context, index: int, image: "Image") -> None:
        """As each image was fetched and decoded (RGB): raise Refuse to turn the request away."""

    async def on_text(self, context: Context, choice: int, part: Part, text: str) -> None:
        """Each piece of text before it is sent (not streamed: each part, whole): raise Stop to end the request."""

    async def after(self, context: Context, answer: Answer) -> None:
        """When a choice is finished, before its end is sent: add to `answer.qvq`, or replace `answer.content`."""


class Refuse(Exception):
    """The request is turned away, with a message for the client and a status from 400 to 499."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.status = message, status


class Stop(Exception):
    """The request ends here: finish_reason content_filter, `ended: filtered`; details go into the `qvq` object."""

    def __init__(self, **details: Any) -> None:
        super().__init__(details)
        self.details = details


def content_parts(messages: list[Any]) -> Iterator[dict[str, Any]]:
    """The parts of all messages' contents, in order."""
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        yield from (part for part in (content if isinstance(content, list) else ()) if isinstance(part, dict))


CONTEXT: ContextVar[Context | None] = ContextVar("qvq_context", default=None)
"""The request that is served: how vLLM's own calls of our parts (images, parser) find it."""
