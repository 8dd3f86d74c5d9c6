"""POST /v1/chat/completions: vLLM's own route, with our hooks around it and the `qvq` object in its response.

A response's bytes are vLLM's, but for what hooks change, `finish_reason: repetition` (which OpenAI does not know), and
the `qvq` object: in the response, or in the chunk that ends a stream; in each choice where there are several.
"""

import asyncio
import hashlib
import json
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import Field, model_validator
from starlette.exceptions import HTTPException
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, validate_json_request, with_cancellation
from vllm.entrypoints.serve.utils.orca_metrics import metrics_header

from qvq_serve import metrics
from qvq_serve.api import lifecycle, limits
from qvq_serve.engine import launched_profile
from qvq_serve.hooks import CONTEXT, OWN_ANSWER, Answer, Context, Part, Refuse, Stop
from qvq_serve.hooks.chain import Chain, HookFailed
from qvq_serve.hooks.images import bound_images
from qvq_serve.hooks.reasoning import PARSERS, PROMPT_TOKENS, STREAMING, Parsed
from qvq_serve.hooks.request import most_tokens

PATH = "/v1/chat/completions"
EVENT_STREAM = "text/event-stream"
UNFINISHED, NO_CHOICES = '"finish_reason":null', '"choices":[]'
DATA, DONE = "data: ", "data: [DONE]\n\n"
PARTS: dict[str, Part] = {"reasoning": "reasoning", "content": "answer"}
"""The fields of a message or delta, and the parts of an answer that hooks know."""
OURS = {"length": "length", "repetition": "looped", "abort": "timeout"}
"""`ended` by vLLM's finish_reason, where it is not `stop`."""
OPENAI = {"repetition": "stop", "abort": "length"}
"""What OpenAI's clients know, for what only vLLM has."""
TIMED_OUT = "timed out"
ABORT_AGAIN_S = 0.2
FIELD, TYPES = re.compile(r"[a-z_]+|\d+"), {"str", "int", "float", "bool", "list", "dict"}


OBJECTS = {
    "structured_outputs": '{"choice": ["yes", "no"]}',
    "response_format": '{"type": "json_object"}',
    "stream_options": '{"include_usage": true}',
    "repetition_detection": '{"max_pattern_size": 32, "min_count": 4}',
}
"""Fields that are objects, each with an example."""


class QvqChatRequest(ChatCompletionRequest):  # type: ignore[misc]
    """vLLM's request, and what only this server has."""

    min_visual_tokens: int | None = Field(None, ge=1, description="Each image is enlarged to at least so many tokens.")
    max_visual_tokens: int | None = Field(None, ge=1, description="Each image is reduced to at most so many tokens.")
    governor: bool | dict[str, Any] | None = Field(None, description="What the governor may do, or false (README).")

    @model_validator(mode="before")
    @classmethod
    def objects_are_objects(cls, data: Any) -> Any:
        """vLLM's own validators take these for objects unseen, and a string there would be a 500."""
        for name in OBJECTS if isinstance(data, dict) else ():
            if data.get(name) is not None and not isinstance(data[name], dict):
                raise ValueError(f"{name} must be an object, for example {OBJECTS[name]}")
        if isinstance(data, dict):
            limits.check_body(data)
        return data

    @model_validator(mode="after")
    def contents_are_lists(self) -> Any:
        """Of a message that pydantic takes for OpenAI's type the parts are an iterator, which can be read once."""
        for message in self.messages:
            if not isinstance(message.get("content"), str | list | None):
                message["content"] = list(message["content"])
        return self


def attach(app: FastAPI) -> None:
    """Put the route in the place of vLLM's, and OpenAI's shape on what Starlette refuses: a method, a body's bytes."""

    @app.exception_handler(HTTPException)  # vLLM's is for FastAPI's own, which derive from it
    async def shaped(_: Request, refused: HTTPException) -> Response:
        return JSONResponse(error(refused.detail, refused.status_code), refused.status_code, refused.headers)

    app.router.add_api_route(
        PATH, create_chat_completion, methods=["POST"], dependencies=[Depends(validate_json_request)],
        route_class_override=Told,
    )  # fmt: skip


class Told(APIRoute):
    """One whose invalid bodies are told in words; vLLM's handler writes pydantic's own structures."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as refused:
                return JSONResponse(error(what_is_invalid(refused.errors()), 400), 400)

        return handled


def what_is_invalid(found: Sequence[Any]) -> str:
    """Of what pydantic found wrong, the first field, what would do, and its value."""
    said: dict[str, list[str]] = {}
    for one in found:
        if not isinstance(one, dict):
            return str(one)
        if one["type"] == "json_invalid":
            return f"the body is no JSON: {one['ctx']['error']} at character {one['loc'][-1]}"
        # Branches of a union stand in the path as well, by their types' names.
        path = ".".join(part for part in map(str, one["loc"][1:]) if FIELD.fullmatch(part) and part not in TYPES)
        said.setdefault(path, []).append(str(one["msg"]).removeprefix("Value error, "))
    path, messages = next(iter(said.items()), ("", ["the body is not valid"]))
    value = found[0].get("input") if path else None
    got = f" (it is {json.dumps(value)[:100]})" if isinstance(value, str | int | float) else ""
    return (f"{path}: " if path else "") + ", or ".join(dict.fromkeys(messages)) + got


@with_cancellation  # type: ignore[untyped-decorator]
@load_aware_call  # type: ignore[untyped-decorator]
async def create_chat_completion(request: QvqChatRequest, raw_request: Request) -> Response:
    """Hooks before, vLLM, hooks after; an ErrorResponse where one of them refuses or fails."""
    chain: Chain = raw_request.app.state.qvq_chain
    context = Context(request, dict(raw_request.headers))
    context.state["chain"] = chain
    CONTEXT.set(context)
    profile = launched_profile()
    # vLLM asks again as the engine gets it, when a stream's 200 may have been sent.
    if profile.max_queued_requests and lifecycle.STATE.running >= profile.max_queued_requests:
        told = f"the server has {profile.max_queued_requests} requests, as many as it takes; try again later"
        return JSONResponse(error(told, 503), 503)
    lifecycle.STATE.running += 1
    raw_request.state.qvq_running = True  # until the door sees it off
    request.request_id = f"{getattr(raw_request.state, 'qvq_request_id', '')}-{uuid.uuid4().hex[:8]}".lstrip("-")
    request.cache_salt = salted(request.cache_salt, getattr(raw_request.state, "qvq_owner", None))
    engine = raw_request.app.state.engine_client
    timer = asyncio.get_running_loop().call_later(profile.request_timeout, time_is_up, context, engine)
    streaming = False
    try:
        limits.check(request, profile)
        bound_images(context)
        await chain.before(context)
        made = await raw_request.app.state.openai_serving_chat.create_chat_completion(request, raw_request)
        if isinstance(made, ErrorResponse):
            if made.error.code >= 500:
                metrics.ANSWERS.labels("error").inc(request.n or 1)
            elif (task := asyncio.current_task()) and task.cancelling():  # vLLM made a 400 of it
                metrics.ANSWERS.labels("cancelled").inc(request.n or 1)
            return JSONResponse(made.model_dump(), made.error.code)
        if isinstance(made, ChatCompletionResponse):
            headers = metrics_header(raw_request.headers.get("endpoint-load-metrics-format", ""))
            return JSONResponse(await whole(context, chain, made.model_dump()), headers=headers)
        streaming = True
    except Refuse as refusal:
        metrics.REJECTED.labels("request").inc()
        return JSONResponse(error(refusal.message, refusal.status), refusal.status)
    except Stop as stop:  # before there is an answer to end
        metrics.REJECTED.labels("request").inc()
        return JSONResponse(error(f"a hook stopped the request: {dict(stop.details)}", 403), 403)
    except HookFailed as failure:
        metrics.ANSWERS.labels("error").inc(request.n or 1)
        return JSONResponse(error(str(failure), 500), 500)
    except asyncio.CancelledError:  # the client went away
        metrics.ANSWERS.labels("cancelled").inc(request.n or 1)
        raise
    except Exception as fault:  # vLLM's handlers answer it
        if create_error_response(fault).error.code >= 500:
            metrics.ANSWERS.labels("error").inc(request.n or 1)
        raise
    finally:
        if not streaming:
            stop_timer(context, timer)
    return Stream(streamed(context, chain, made, engine), partial(stop_timer, context, timer))


class Stream(StreamingResponse):
    """One whose generator is closed as it ends, so that the engine's place is free: a client that stopped reading
    leaves it at a `yield`, where only the collector of garbage would find it."""

    def __init__(self, body: AsyncGenerator[str, None], over: Callable[[], None]) -> None:
        super().__init__(body, media_type=EVENT_STREAM)
        self.events, self.over = body, over

    async def __call__(self, *asgi: Any) -> None:
        try:
            await super().__call__(*asgi)
        finally:
            self.over()  # where it never began, too
            await self.events.aclose()


def engine_id(context: Context) -> str:
    """The request's name in the engine."""
    return f"chatcmpl-{context.request.request_id}"


def time_is_up(context: Context, engine: Any) -> None:
    """End a request whose time is over: vLLM finishes it with what there is."""

    async def abort() -> None:
        while True:  # its image or the guard may be waited for, and the engine know nothing of it yet
            await engine.abort(engine_id(context))
            await asyncio.sleep(ABORT_AGAIN_S)

    context.state[TIMED_OUT] = asyncio.create_task(abort())


def stop_timer(context: Context, timer: asyncio.TimerHandle) -> None:
    """The request is over, or handed to its stream."""
    timer.cancel()
    if aborting := context.state.get(TIMED_OUT):
        aborting.cancel()


def salted(salt: str | None, owner: str | None) -> str | None:
    """A client's salt of the prefix cache, made its key's own: tenants do not see each other's prefixes by the time."""
    return hashlib.sha256(f"{owner}:{salt or ''}".encode()).hexdigest() if owner else salt


def error(message: str, status: int) -> dict[str, Any]:
    """An error as vLLM and OpenAI shape it."""
    kind = "BadRequestError" if status < 500 else {503: "ServiceUnavailableError"}.get(status, "InternalServerError")
    shaped: dict[str, Any] = ErrorResponse(error=ErrorInfo(message=message, type=kind, code=status)).model_dump()
    return shaped


def how_it_ended(context: Context, finish_reason: str | None, parsed: Parsed) -> str:
    """`ended` of a choice that vLLM finished."""
    if finish_reason in OURS:
        return OURS[finish_reason]
    if parsed.act:
        return parsed.act.ended
    budget = context.request.thinking_token_budget
    if parsed.marked and budget is not None and 0 <= budget <= parsed.reasoning_tokens:
        return "concluded"
    return "answered" if parsed.marked else "unmarked"


def told(finish_reason: str, answer: Answer) -> str:
    """`finish_reason` as OpenAI has it; to vLLM a turn that the governor ended at its limit has stopped."""
    return "length" if answer.ended == "length" else OPENAI.get(finish_reason, finish_reason)


async def completed(context: Context, chain: Chain, answer: Answer, parsed: Parsed) -> Answer:
    """The choice with its `qvq` object, hooks' share included, counted in the metrics."""
    answer.qvq |= {
        "ended": answer.ended,
        "visual_tokens": sum(image.visual_tokens for image in context.images.values()),
        "reasoning_tokens": parsed.reasoning_tokens,
        "answer_tokens": parsed.tokens - parsed.reasoning_tokens,
    }
    if parsed.act:
        answer.qvq["governor"] = {"found": parsed.act.why, "period": parsed.act.period}
    try:
        await chain.after(context, answer)
    except Stop:  # it told so of the text before; here there is none to stop
        if answer.ended != "filtered":
            raise
    count(answer, parsed)
    if parsed.act and parsed.act.why == "loop":
        most = most_tokens(context.request, launched_profile(), context.state.get(PROMPT_TOKENS, 0))
        metrics.SAVED.inc(max(most - parsed.tokens, 0))
    return answer


def count(answer: Answer, parsed: Parsed) -> None:
    """One finished choice, in the metrics."""
    metrics.ANSWERS.labels(answer.ended).inc()
    metrics.TOKENS.labels("reasoning").inc(parsed.reasoning_tokens)
    metrics.TOKENS.labels("answer").inc(parsed.tokens - parsed.reasoning_tokens)
    metrics.SWITCHES.inc(answer.qvq.get("language_switches", 0))
    if answer.ended not in OWN_ANSWER:
        metrics.WASTED.labels(answer.ended).inc(parsed.tokens)


async def whole(context: Context, chain: Chain, response: dict[str, Any]) -> dict[str, Any]:
    """A response that is not streamed, with hooks run over each choice. Raises Refuse or HookFailed."""
    context.first_text = time.monotonic()
    results = [result for parser in context.state[PARSERS] for result in parser.results]
    several = len(response["choices"]) > 1
    for choice, parsed in zip(response["choices"], results, strict=True):
        message = choice["message"]
        answer = Answer(
            choice["index"], parsed.reasoning, message["content"] or "",
            how_it_ended(context, choice["finish_reason"], parsed), {},
        )  # fmt: skip
        content = answer.content
        try:
            for field, part in PARTS.items():
                if text := message[field]:
                    await chain.on_text(context, answer.index, part, text)
            await completed(context, chain, answer, parsed)
        except Stop as stop:
            answer = Answer(answer.index, "", "", "filtered", dict(stop.details))
            await completed(context, chain, answer, parsed)
            message |= {"reasoning": None, "content": None}
            choice |= {"finish_reason": "content_filter", "logprobs": None, "token_ids": None}  # they tell the text too
        else:
            if answer.content != content:
                message["content"] = answer.content
                choice |= {"logprobs": None, "token_ids": None}  # of what it was
        choice["finish_reason"] = told(choice["finish_reason"], answer)
        (choice if several else response)["qvq"] = answer.qvq
    return response


async def streamed(
    context: Context, chain: Chain, events: AsyncGenerator[str, None], engine: Any
) -> AsyncGenerator[str, None]:
    """A stream of server-sent events, with hooks run over each piece of text before it is sent."""
    CONTEXT.set(context)  # vLLM makes the stream's parsers as it begins
    context.state[STREAMING] = True
    open_choices = set(range(context.request.n or 1))
    several = len(open_choices) > 1
    untouched = not chain.stages["on_text"]
    stopped, running = set[int](), set(open_choices)  # by a hook; in the engine
    first = ""
    try:
        async for event in events:
            first = first or event
            if TIMED_OUT in context.state and (event == DONE or NO_CHOICES in event):
                for index in sorted(running & open_choices):  # vLLM tells no end of one that has no token yet
                    reason = "length"
                    try:
                        answer = await finished(context, chain, index, "timeout", {})
                    except Stop as stop:
                        answer = await finished(context, chain, index, "filtered", dict(stop.details))
                        reason = "content_filter"
                    open_choices.discard(index)
                    yield closing(json.loads(first[len(DATA) :]), index, answer.qvq, several, reason)
            if context.first_text is None and '"role"' not in event:
                context.first_text = time.monotonic()
            if not event.startswith(DATA + "{") or (untouched and UNFINISHED in event):
                yield event
                continue
            chunk = json.loads(event[len(DATA) :])
            if "error" in chunk:
                metrics.ANSWERS.labels("error").inc(len(open_choices))
                open_choices.clear()
            for choice in chunk.get("choices", ()):  # one a chunk, as vLLM writes them
                index = choice["index"]
                if choice.get("finish_reason"):
                    running.discard(index)
                if index in stopped:
                    event = ""
                    continue
                try:
                    event = await passed(context, chain, chunk, choice, event)
                except Stop as stop:
                    answer = await finished(context, chain, index, "filtered", dict(stop.details))
                    event = closing(chunk, index, answer.qvq, several)
                    stopped.add(index)
                if index in stopped or index not in running:
                    open_choices.discard(index)
            if event:
                yield event
            if stopped & running and not open_choices:  # what nobody gets is not written; vLLM then tells the usage
                running.clear()
                await engine.abort(engine_id(context))
    except (HookFailed, Refuse) as failure:
        metrics.ANSWERS.labels("error").inc(len(open_choices))
        open_choices.clear()
        status = failure.status if isinstance(failure, Refuse) else 500
        yield f"{DATA}{json.dumps(error(str(failure), status))}\n\n{DONE}"
    finally:
        if open_choices:  # the client went away
            metrics.ANSWERS.labels("cancelled").inc(len(open_choices))
        await events.aclose()


async def finished(
    context: Context, chain: Chain, index: int, ended: str | None, qvq: dict[str, Any], reason: str | None = None
) -> Answer:
    """A choice of a stream with its `qvq` object; it ended as said, or else as vLLM's finish_reason and text tell."""
    parser = context.state[PARSERS][index - (context.request.n or 1)]  # one for each, after those of the request itself
    parsed = parser.parsed()
    ended = ended or how_it_ended(context, reason, parsed)
    answer = Answer(index, parser.sent["reasoning"], parser.sent["content"], ended, qvq)
    return await completed(context, chain, answer, parsed)


async def passed(context: Context, chain: Chain, chunk: dict[str, Any], choice: dict[str, Any], event: str) -> str:
    """The event of a chunk, after the hooks saw its text; with the `qvq` object where the choice ends."""
    for field, part in PARTS.items():
        if piece := choice["delta"].get(field):
            await chain.on_text(context, choice["index"], part, piece)
    if not (reason := choice.get("finish_reason")):
        return event
    answer = await finished(context, chain, choice["index"], None, {}, reason)
    if (finish := told(reason, answer)) != reason:
        choice["finish_reason"] = finish
        event = f"{DATA}{compact(chunk)}\n\n"
    if (context.request.n or 1) > 1:
        choice["qvq"] = answer.qvq
        return f"{DATA}{compact(chunk)}\n\n"
    return f'{event.rstrip()[:-1]},"qvq":{compact(answer.qvq)}}}\n\n'


def closing(
    last: dict[str, Any], index: int, qvq: dict[str, Any], several: bool, reason: str = "content_filter"
) -> str:
    """The chunk that ends a choice which a hook stopped, or whose end vLLM does not tell."""
    choice: dict[str, Any] = {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}
    chunk = {key: last[key] for key in ("id", "object", "created", "model")} | {"choices": [choice]}
    (choice if several else chunk)["qvq"] = qvq
    return f"{DATA}{compact(chunk)}\n\n"


def compact(value: Any) -> str:
    """JSON as vLLM writes it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
