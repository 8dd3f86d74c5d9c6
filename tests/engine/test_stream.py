"""What ends a stream, where no server is needed: readers that stand still, and times that are up too early."""

import asyncio
import contextlib
import gc
import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from qvq_serve.hooks import CONTEXT, Answer, Context, Hook, Stop
from qvq_serve.profile import Profile
from tests.engine.test_reasoning import parser


@pytest.mark.parametrize("version", ["2.3", "2.4"])
def test_a_stream_whose_client_stopped_reading_is_closed(version: str) -> None:
    """Its request went on in the engine until garbage was collected."""
    from qvq_serve.api.chat import Stream

    ended: list[str] = []

    async def pieces() -> AsyncGenerator[str, None]:
        try:
            while True:
                yield "data: {}\n\n"
        finally:
            ended.append("the engine's")

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(3600)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(3600)
        return {}

    async def cut_off() -> list[str]:
        stream = Stream(pieces(), lambda: ended.append("the timer"))
        task = asyncio.create_task(stream({"type": "http", "asgi": {"spec_version": version}}, receive, send))
        await asyncio.sleep(0.05)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return list(ended)

    gc.disable()
    try:
        assert asyncio.run(cut_off()) == ["the timer", "the engine's"]
    finally:
        gc.enable()


@pytest.mark.parametrize("stopped", [True, False])
@pytest.mark.parametrize("usage", [True, False])
def test_a_stream_whose_time_is_up_before_its_first_token_says_so(usage: bool, stopped: bool) -> None:
    """vLLM writes no end of it, and the client got a role and [DONE]."""
    from qvq_serve.api.chat import TIMED_OUT, streamed
    from qvq_serve.hooks.chain import Chain

    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    delta = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    async def vllms() -> AsyncGenerator[str, None]:
        yield f"data: {json.dumps(head | {'choices': [delta]}, separators=(',', ':'))}\n\n"
        context.state[TIMED_OUT] = asyncio.create_task(asyncio.sleep(0))
        if usage:
            yield f"data: {json.dumps(head | {'choices': [], 'usage': {}}, separators=(',', ':'))}\n\n"
        yield "data: [DONE]\n\n"

    async def sent() -> list[str]:
        return [event async for event in streamed(context, chain, vllms(), SimpleNamespace())]

    class Stops(Hook):
        async def after(self, context: Context, answer: Answer) -> None:
            if stopped:
                raise Stop(why="always")

    chain = Chain([Stops(Profile())], 1)
    context = Context(
        SimpleNamespace(n=1, thinking_token_budget=None, continue_final_message=False, structured_outputs=None)
    )
    token = CONTEXT.set(context)
    try:
        parser()
    finally:
        CONTEXT.reset(token)
    events = asyncio.run(sent())
    assert len(events) == 3 + usage and events[-1] == "data: [DONE]\n\n"
    last = json.loads(events[1][6:])
    ended = ("content_filter", "filtered") if stopped else ("length", "timeout")
    assert (last["choices"][0]["finish_reason"], last["qvq"]["ended"]) == ended
    assert last["id"] == "chatcmpl-1"
