"""Hooks for the tests; what they do is asked for in the request's text."""

import asyncio
from typing import Any

from qvq_serve.hooks import Answer, Context, Hook, Part, Refuse, Stop


def asked(context: Context) -> str:
    return str(context.request.messages)


class Obliging(Hook):
    """Does what the prompt says."""

    name = "obliging"

    async def before(self, context: Context) -> None:
        if "refuse me" in asked(context):
            raise Refuse("no such talk here", 403)
        if "raise in before" in asked(context):
            raise KeyError("a fault of the hook")
        if "sleep in before" in asked(context):
            await asyncio.sleep(20)
        if "one token" in asked(context):
            context.request.max_tokens = 1

    async def on_image(self, context: Context, index: int, image: Any) -> None:
        if image.size == (77, 77):
            raise Refuse("is 77 x 77 px, of which there were enough", 451)

    async def on_text(self, context: Context, choice: int, part: Part, text: str) -> None:
        if "stop at once" in asked(context) or ("stop the first" in asked(context) and choice == 0):
            raise Stop(by="obliging", part=part)
        if "pause in text" in asked(context) and not context.state.get("pieces"):
            await asyncio.sleep(2.5)
        if "raise in text" in asked(context) and len(context.state.setdefault("pieces", [])) > 3:
            raise KeyError("a fault of the hook")
        context.state.setdefault("pieces", []).append((part, text))

    async def after(self, context: Context, answer: Answer) -> None:
        answer.qvq["pieces"] = len(context.state.get("pieces", []))
        answer.qvq["sizes"] = [[image.width, image.height] for image in context.images.values()]
        if "stop at the end" in asked(context):
            raise Stop(by="obliging", part="end")
        if "replace it" in asked(context):
            answer.content = "Replaced."
