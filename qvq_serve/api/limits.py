"""What a request may ask for: fields by an allow-list, and bounds on what could stall or kill the engine."""

import json
import math
import re
from typing import Any

import msgspec

from qvq_serve.errors import nearest
from qvq_serve.hooks import Refuse, content_parts
from qvq_serve.hooks.request import most_tokens
from qvq_serve.profile import Profile

IGNORED = frozenset({
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "verbosity", "modalities", "audio", "moderation", "prompt_cache_options", "prediction", "web_search_options",
    "function_call", "functions", "reasoning",
})  # fmt: skip
"""Fields of OpenAI's that clients send by themselves; vLLM ignores them, and so do we."""
AS_IT_IS = {"separate_reasoning": True, "stream_reasoning": True, "no_stop_trim": False, "return_hidden_states": False}
"""SGLang's fields, which vLLM's router puts into each request: taken where they ask for what is done anyway."""
REFUSED = {
    "use_beam_search": "it takes the engine's time from everybody",
    "prompt_logprobs": "it holds the logits of the whole prompt in memory",
    "echo": "the prompt is the client's already",
    "documents": "QVQ's template has no place for them",
    "chat_template": "the server's own is used",
    "tools": "QVQ was not made to call tools",
    "kv_transfer_params": "it is for servers among themselves",
    "ec_transfer_params": "it is for servers among themselves",
    "truncate_prompt_tokens": "it would cut images in two; make the prompt shorter",
    "mm_processor_kwargs": "min_visual_tokens and max_visual_tokens bound images",
    "media_io_kwargs": "min_visual_tokens and max_visual_tokens bound images",
}
"""Fields that are refused where they say anything, with the reason."""
# vLLM 0.32's V2 runner holds so many, and dies of more: v1/worker/gpu/sample/logit_bias.py. One stop id is the model's.
MOST_LOGIT_BIAS, MOST_ALLOWED_TOKENS, MOST_STOP_IDS = 1024, 1024, 120
MOST_BAD_WORDS, MOST_BAD_BYTES, MOST_STOP_CHARACTERS = 64, 1024, 256
MOST_LOGPROBS, MOST_HELD_LOGPROBS = 20, 50_000
"""vLLM writes those of a whole answer in one go, some 60 us each, and no stream or probe is served meanwhile."""
MOST_GRAMMAR_CHARACTERS = 50_000
MOST_LOOP_PATTERN = 128
MOST_MESSAGES, MOST_PARTS = 512, 1024
MOST_INT = 2**31 - 1
"""vLLM hands these to the engine as 64-bit integers; what is larger is no count of tokens."""
MOST_UNROLLED, MOST_COUNTED = 10_000, 20_000
"""Of a schema: characters of a pattern by how often it may repeat (of several, the root of their squares' sum);
properties by how many must or may be there. xgrammar takes up to half a second for so much, in the loop that all
requests share, and minutes for more."""
REPEATED = re.compile(r"\{(\d+)(?:,(\d*))?\}")
AS_TEXT = ("json", "structural_tag")
"""Fields of a grammar that may be JSON or its text."""
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
PARTS = ("text", "image_url")
REFUSED_LATER = ("video_url", "audio_url")
"""With a reason of their own."""


def check_body(body: dict[str, Any]) -> None:
    """Bounds of a body as it came, before vLLM's own model reads it, lazily and at length. Raises ValueError."""
    for name, value in body.items():
        if name == "messages":
            continue
        try:  # as vLLM hands it to the engine, where a place would be lost
            msgspec.msgpack.encode(value)
        except UnicodeEncodeError:
            raise ValueError(f"{name} has half of a surrogate pair, which is no character") from None
        except OverflowError:
            raise ValueError(f"{name} has a number of more than 64 bits") from None
        except RecursionError:
            raise ValueError(f"{name} is nested too deeply") from None
    for name in ("structured_outputs", "response_format"):  # vLLM compiles some as it reads the body
        if (size := len(str(body.get(name)))) > MOST_GRAMMAR_CHARACTERS:
            raise ValueError(f"the grammar has {size} characters; this server takes at most {MOST_GRAMMAR_CHARACTERS}")
        check_cost(body.get(name))
    parts, messages = 0, body.get("messages")
    if "messages" in body and not (isinstance(messages, list) and all(isinstance(one, dict) for one in messages)):
        raise ValueError('messages must be a list of objects, for example [{"role": "user", "content": "Hi"}]')
    for number, message in enumerate(messages or ()):
        for key in [key for key in message if message[key] is None and key != "content"]:
            del message[key]  # as clients send what they do not set
        content = message.get("content")
        if not isinstance(content, list):
            continue
        parts += len(content)
        if parts > MOST_PARTS:
            raise ValueError(f"the messages have more than {MOST_PARTS} parts, the most that this server takes")
        for part in content:
            known = part if isinstance(part, dict) else {}
            kind = known.get("type", next((name for name in PARTS if name in known), None))
            if kind not in (*PARTS, *REFUSED_LATER):
                raise ValueError(
                    f"messages[{number}] has a part of type {kind!r}; it must be one of {', '.join(PARTS)}"
                )
            part["type"] = kind  # pydantic would not tell a part by its keys
            if kind == "image_url" and not isinstance(part.get("image_url"), dict | str | None):
                raise ValueError(f"messages[{number}] has a part of type 'image_url' whose image_url is no object")
            if kind == "text" and not isinstance(part.get("text"), str):
                raise ValueError(f"messages[{number}] has a part of type 'text' whose text is no string")


def check(request: Any, profile: Profile) -> None:
    """Raises Refuse, naming the field, the value and what would do; drops what is not the client's to set."""
    for name, value in (request.model_extra or {}).items():
        if value is None:
            continue
        if name in AS_IT_IS and value is not AS_IT_IS[name]:
            raise Refuse(f"the field '{name}' is {json.dumps(value)}; here it can only be {json.dumps(AS_IT_IS[name])}")
        if name not in IGNORED and name not in AS_IT_IS:
            raise Refuse(f"the field '{name}' is not known here.{nearest(name, known(request))}")
    for name, reason in REFUSED.items():
        value = getattr(request, name, None)
        if value or type(value) is int:  # 0 prompt_logprobs are computed too
            raise Refuse(f"the field '{name}' is not taken: {reason}")
    for message in request.messages:
        if message["role"] not in ROLES:
            raise Refuse(f"the role '{message['role']}' is not known; it must be one of {', '.join(ROLES)}")
    if "system_prompt" in (request.chat_template_kwargs or {}):
        raise Refuse("chat_template_kwargs.system_prompt is the server's; send a message of the role 'system'")
    for name, found, most in sizes(request, profile):
        if found > most:
            raise Refuse(f"{name} is {found}; this server takes at most {most}")
    request.priority, request.session_id = 0, None
    if request.vllm_xargs and request.governor is not False:  # the governor's switches, by another name
        request.governor = request.vllm_xargs | (request.governor if isinstance(request.governor, dict) else {})
    request.vllm_xargs = None
    drop_uuids(request.messages)


def known(request: Any) -> list[str]:
    """The fields that a request can have."""
    return [name for name in type(request).model_fields if name not in REFUSED]


def sizes(request: Any, profile: Profile) -> list[tuple[str, int, int]]:
    """(what, how much of it, the most) of a request."""
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    loop = request.repetition_detection
    likely = max(request.top_logprobs or 0, len(request.logprob_token_ids or ()), 1) if request.logprobs else 0
    held = 0 if request.stream else likely * (request.n or 1) * most_tokens(request, profile)
    return [
        ("n", request.n or 1, min(profile.max_choices, profile.max_queued_requests or profile.max_choices)),
        ("the number of messages", len(request.messages), MOST_MESSAGES),
        ("the length of logit_bias", len(request.logit_bias or ()), MOST_LOGIT_BIAS),
        ("the length of allowed_token_ids", len(request.allowed_token_ids or ()), MOST_ALLOWED_TOKENS),
        ("the length of stop_token_ids", len(request.stop_token_ids or ()), MOST_STOP_IDS),
        ("the length of logprob_token_ids", len(request.logprob_token_ids or ()), MOST_LOGPROBS),
        ("n x max_tokens x top_logprobs of a request that is not streamed", held, MOST_HELD_LOGPROBS),
        ("the length of bad_words", len(request.bad_words or ()), MOST_BAD_WORDS),
        # vLLM holds each with a space before it and without; a token has a byte or more.
        (
            "the bytes of all bad_words",
            sum(2 * len(word.encode()) + 1 for word in request.bad_words or ()),
            MOST_BAD_BYTES,
        ),
        ("the length of a stop string", max(map(len, stops), default=0), MOST_STOP_CHARACTERS),
        ("the length of a bad word", max(map(len, request.bad_words or ()), default=0), MOST_STOP_CHARACTERS),
        ("thinking_token_budget", request.thinking_token_budget or 0, MOST_INT),
        ("repetition_detection.min_count", loop.min_count if loop else 0, MOST_INT),
        ("repetition_detection.max_pattern_size", loop.max_pattern_size if loop else 0, MOST_LOOP_PATTERN),
        ("min_tokens", request.min_tokens, profile.max_output_tokens),
    ]


def drop_uuids(messages: list[Any]) -> None:
    """An image's uuid would stand for its content in the caches that all clients share."""
    for part in content_parts(messages):
        part.pop("uuid", None)


def check_cost(grammar: Any) -> None:
    """Raises ValueError for a grammar, as a client may send one, that takes xgrammar long."""
    squares, counted, rest = 0, 0, [grammar]
    while rest:
        part = rest.pop()
        if isinstance(part, list):
            rest += part
        elif isinstance(part, dict):
            rest += [loads(value) if name in AS_TEXT else value for name, value in part.items()]
            named = part.get("patternProperties")
            patterns = [part.get("pattern"), *(named if isinstance(named, dict) else ())]
            for pattern in (one for one in patterns if isinstance(one, str)):
                times = [int(count or 0) for found in REPEATED.findall(pattern) for count in found]
                squares += (max(times, default=0) * len(pattern)) ** 2
            bounds = [part.get(name) for name in ("minProperties", "maxProperties")]
            most = max((bound for bound in bounds if isinstance(bound, int)), default=0)
            counted += most * len(part["properties"] if isinstance(part.get("properties"), dict) else ())
    if (unrolled := math.isqrt(squares)) > MOST_UNROLLED:
        raise ValueError(
            f"the grammar's patterns repeat {unrolled} characters, above {MOST_UNROLLED}; maxLength costs nothing"
        )
    if counted > MOST_COUNTED:
        raise ValueError(
            f"the grammar counts {counted} properties by minProperties and maxProperties, above {MOST_COUNTED}"
        )


def loads(value: Any) -> Any:
    """JSON that may be given as its text; None for what is none, which vLLM will say."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None
