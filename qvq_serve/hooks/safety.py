"""A guard model over prompt, images, reasoning and answer: another OpenAI-compatible server that says safe or unsafe.

Qwen3Guard and Llama Guard are known; each brings its own prompt in its chat template, and gets the conversation as
messages. Reasoning and answer are checked apart, in windows, while they stream; a window's last piece is sent once the
window passed, so what a client has seen before a stop is less than one window.
"""

import asyncio
import json
import logging
import os
import re
from dataclasses import dataclass
from typing import Any

from qvq_serve import metrics
from qvq_serve.errors import UsageError
from qvq_serve.hooks import Answer, Context, Hook, Part, Refuse, Stop
from qvq_serve.hooks.chain import names
from qvq_serve.profile import Profile

log = logging.getLogger("vllm.qvq_serve")
QWEN = re.compile(r"Safety:\s*(Safe|Unsafe|Controversial)", re.IGNORECASE)
QWEN_CATEGORIES = re.compile(r"Categories:\s*([^\n]+)", re.IGNORECASE)
LLAMA = re.compile(r"\s*(safe|unsafe)\s*(?:\n\s*(S\d+(?:\s*,\s*S\d+)*))?\s*$", re.IGNORECASE)
SEES_IMAGES = re.compile(r"llama-guard-4|guard.*vision", re.IGNORECASE)
"""Names of guards that take images; others get the texts."""
MOST_TOKENS = 64
OVERLAP = 100
"""Characters of a window that are read again with the next one, so that no phrase is cut in two."""


@dataclass(frozen=True)
class Verdict:
    """What a guard said: safe, controversial or unsafe, and of which categories."""

    verdict: str
    categories: tuple[str, ...] = ()


def parse_verdict(text: str) -> Verdict | None:
    """The verdict in a guard's output, by Qwen3Guard's form or Llama Guard's; None for any other text.

    Source: the model cards of Qwen3Guard-Gen and Llama-Guard-4-12B.
    """
    if match := QWEN.search(text):
        found = QWEN_CATEGORIES.search(text)
        listed = [name.strip() for name in found[1].split(",")] if found else []
        return Verdict(match[1].lower(), tuple(name for name in listed if name.lower() != "none"))
    if match := LLAMA.match(text):
        return Verdict(match[1].lower(), tuple(name.strip() for name in (match[2] or "").split(",") if name.strip()))
    return None


def joined(a: Any, b: Any) -> Any:
    """The contents of two messages, each a text or parts, as one."""
    if isinstance(a, str) and isinstance(b, str):
        return f"{a}\n{b}"
    return [part for one in (a, b) for part in ([{"type": "text", "text": one}] if isinstance(one, str) else one)]


def url_of(part: dict[str, Any]) -> Any:
    """The address of a message's image, which is an object or a text."""
    image = part["image_url"]
    return image.get("url") if isinstance(image, dict) else image


class Guard(Hook):
    """Refuses a prompt, and stops a reasoning or an answer, that the guard model calls unsafe."""

    name = "guard"

    def __init__(self, profile: Profile) -> None:
        import openai

        self.profile = profile
        self.blocks = names(profile.guard_blocks)
        if unknown := set(self.blocks) - {"unsafe", "controversial"}:
            raise UsageError(f"--guard-blocks {', '.join(unknown)}: the verdicts are unsafe and controversial.")
        if "unsafe" not in self.blocks:
            raise UsageError("--guard-blocks must have unsafe in it: unsafe, or unsafe,controversial.")
        try:
            self.extra_body = json.loads(profile.guard_extra_body or "{}")
        except ValueError as error:
            raise UsageError(f"--guard-extra-body is no JSON: {error}.") from None
        if not isinstance(self.extra_body, dict):
            raise UsageError(f"--guard-extra-body {profile.guard_extra_body}: it must be a JSON object.")
        base_url = str(profile.guard_url).rstrip("/").removesuffix("/v1") + "/v1"
        key = profile.guard_api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self.client = openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=profile.guard_timeout)
        self.model = profile.guard_model

    async def before(self, context: Context) -> None:
        """The whole conversation."""
        found = await self.check(context, "prompt")
        if found:
            raise Refuse(f"the request was refused by the server's guard: {said(found)}", 403)

    async def on_text(self, context: Context, choice: int, part: Part, text: str) -> None:
        """Gather text, and check it by windows."""
        window = context.state.setdefault(f"guard {choice} {part}", [])
        if part == "answer":
            await self.flush(context, choice, "reasoning")
        window.append(text)
        if sum(map(len, window)) >= self.profile.guard_window:
            await self.flush(context, choice, part)

    async def after(self, context: Context, answer: Answer) -> None:
        """What is left of both parts, before the end is sent."""
        if answer.ended != "filtered":
            for part in ("reasoning", "answer"):
                await self.flush(context, answer.index, part)

    async def flush(self, context: Context, choice: int, part: Part) -> None:
        """Check what was gathered of a part, as the assistant's turn. Raises Stop."""
        window = context.state.get(f"guard {choice} {part}", [])
        seen = context.state.get(f"guard {choice} {part} seen", "")
        if not window:
            return
        text = seen + "".join(window)
        window.clear()
        context.state[f"guard {choice} {part} seen"] = text[-OVERLAP:]
        if found := await self.check(context, part, {"role": "assistant", "content": text}):
            raise Stop(guard={"part": part, "verdict": found.verdict, "categories": list(found.categories)})

    def conversation(self, context: Context, model: str, *more: dict[str, Any]) -> list[dict[str, Any]]:
        """The request's turns, their images only where the guard sees them.

        What is not the model's own is a user's, a system message too: the client wrote it. Guards want turns that
        alternate, a user's first. Raises Refuse for an image that the guard would fetch by itself, from wherever.
        """
        images = bool(SEES_IMAGES.search(model))
        turns: list[dict[str, Any]] = []
        for message in (*context.request.messages, *more):
            content = message.get("content") or ""
            if isinstance(content, list):
                parts = [part for part in content if part.get("type") == "text" or (images and "image_url" in part)]
                content = parts if images else "\n".join(part["text"] for part in parts)
                if images and not all(str(url_of(part)).startswith("data:") for part in parts if "image_url" in part):
                    raise Refuse("the server's guard sees images, which must come as data: URLs", 400)
            role = "assistant" if message["role"] == "assistant" else "user"
            if role == "assistant" and not turns:
                turns.append({"role": "user", "content": ""})
            if content and turns and turns[-1]["role"] == role:
                turns[-1]["content"] = joined(turns[-1]["content"], content)
            elif content:
                turns.append({"role": role, "content": content})
        return turns or [{"role": "user", "content": ""}]

    async def model_name(self) -> str:
        """The guard's name on its server, asked for once. Raises OpenAIError or IndexError where it does not say."""
        if self.model is None:
            self.model = (await self.client.models.list()).data[0].id
        return self.model

    async def check(self, context: Context, part: str, *turns: dict[str, Any]) -> Verdict | None:
        """The verdict on the conversation and these turns where it blocks, else None.

        A guard that does not answer in time blocks by --guard-failure closed, and what it cannot read always: else a
        prompt longer than its context would pass.
        """
        import openai

        unreadable = False
        options: dict[str, Any] = {"temperature": 0, "max_tokens": MOST_TOKENS, "extra_body": self.extra_body}
        try:
            async with asyncio.timeout(self.profile.guard_timeout):  # httpx's is of each phase
                model = await self.model_name()
                messages: Any = self.conversation(context, model, *turns)
                made = await self.client.chat.completions.create(model=model, messages=messages, **options)
            text = made.choices[0].message.content or ""
            found, reason = parse_verdict(text), f"said {text[:80]!r}"
        except Refuse:
            raise
        # The last three: a 200 that is no completion, as of a proxy's page.
        except (openai.OpenAIError, LookupError, TimeoutError, ValueError, TypeError, AttributeError) as error:
            found, reason = None, type(error).__name__
            unreadable = isinstance(error, openai.APIStatusError) and error.status_code in (400, 413, 422)
            if isinstance(error, openai.NotFoundError):
                self.model = self.profile.guard_model  # another model may be there now
        if found is None:
            log.warning("the guard gave no verdict on the %s: %s", part, reason)
            metrics.GUARD.labels(part, "none").inc()
            return None if self.profile.guard_failure == "open" and not unreadable else Verdict("none")
        metrics.GUARD.labels(part, found.verdict).inc()
        return found if found.verdict in self.blocks else None


def said(found: Verdict) -> str:
    """A verdict for a client."""
    if found.verdict == "none":
        return "the guard did not answer; try again later"
    categories = ", ".join(found.categories)
    return f"{found.verdict} ({categories})" if categories else found.verdict
