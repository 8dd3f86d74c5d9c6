"""What a request gets before it runs: a thinking budget, an end of loops, a grammar behind the reasoning."""

import json
import re
from typing import Any

from qvq_serve.hooks import Context, Hook, Refuse
from qvq_serve.hooks.markers import ENDED, GRAMMARS_LEAD, MARKERS
from qvq_serve.profile import Profile

SHARE_OF_REASONING = 0.75
"""Of a structured request's output, where it has no budget: the rest is for what the grammar describes."""


DEFAULT_LOOPS = "default detection of loops"
"""Where a request's context says that its detection of loops is the server's, not its own."""
LOOP_LEAST, LOOP_COUNT = 8, 6
"""A loop: a pattern of at least so many tokens, so many times in a row; zeros of a matrix are none yet."""
SOURCE_LINE = r"^\[[\d:]+\] \S+: "
MOST_WHITESPACE = 24
"""Of JSON, in one place: enough for its indentation, and no loop of spaces."""
BEHIND = "grammar behind the reasoning"
"""Where a request's context says that its answer is a grammar's."""


class RequestDefaults(Hook):
    """Bounds `thinking_token_budget`, ends exact loops, and moves a grammar behind the reasoning."""

    name = "request"

    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    async def before(self, context: Context) -> None:
        from vllm.exceptions import VLLMClientError

        request = context.request
        most, asked = self.profile.thinking_budget, request.thinking_token_budget
        if most is not None:
            request.thinking_token_budget = most if asked is None or asked < 0 else min(asked, most)
        try:
            grammar = request.extract_structured_outputs()
            behind = None if grammar is None or is_answering(request) else behind_reasoning(grammar)
        # RuntimeError: xgrammar's, with the line of its source before it
        except (ValueError, RuntimeError, VLLMClientError) as error:
            raise Refuse(f"the grammar cannot be used: {re.sub(SOURCE_LINE, '', str(error))}") from None
        if grammar is None and request.repetition_detection is None and self.profile.loop_pattern:
            request.repetition_detection = loop_detection(self.profile.loop_pattern)
            context.state[DEFAULT_LOOPS] = True
        if behind is None:
            return
        # With a grammar the budget ends a loop, so that its answer comes.
        request.structured_outputs, request.response_format = behind, None
        context.state[BEHIND] = True
        if asked is None or asked < 0:
            share = int(most_tokens(request, self.profile) * SHARE_OF_REASONING)
            request.thinking_token_budget = share if most is None else min(most, share)


def most_tokens(request: Any, profile: Profile, prompt_tokens: int = 0) -> int:
    """Tokens that a request may write at most, beside a prompt of so many."""
    most = min(profile.max_output_tokens, profile.max_model_len - prompt_tokens)
    return min(request.max_completion_tokens or request.max_tokens or most, most)


def loop_detection(most: int) -> Any:
    """vLLM's own detection of exact loops, of patterns up to `most` tokens."""
    from vllm.sampling_params import RepetitionDetectionParams

    return RepetitionDetectionParams(max_pattern_size=most, min_pattern_size=LOOP_LEAST, min_count=LOOP_COUNT)


def is_answering(request: Any) -> bool:
    """Whether the request is to continue a message that has its marker already."""
    return bool(request.continue_final_message and ENDED.search(str(request.messages[-1].get("content"))))


def behind_reasoning(grammar: Any) -> Any:
    """Any text up to the first marker, then what the grammar describes. The model cannot stop before it has written it.

    The other markers cannot be written: a budget of vLLM's, which does not know them, would write its own into the
    answer. vLLM starts a grammar after the reasoning where a parser tells its end by a token; QVQ's ends by words.
    Raises ValueError or RuntimeError for what cannot be compiled, or would not be enforced.
    """
    from vllm.parser.abstract_parser import structured_outputs_to_format
    from vllm.sampling_params import StructuredOutputsParams, check_json_nesting
    from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features
    from xgrammar import Grammar

    for name in ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"):
        if getattr(grammar, name):
            raise ValueError(f"structured_outputs.{name} has no effect behind the reasoning; leave it out")
    schema = json.loads(grammar.json) if isinstance(grammar.json, str) else grammar.json
    if isinstance(schema, dict):
        check_json_nesting(schema)
        if has_xgrammar_unsupported_json_features(schema):
            raise ValueError("its JSON schema asks for what xgrammar does not enforce, such as uniqueItems or contains")
    text = {"type": "any_text", "excludes": list(MARKERS[1:])}
    reasoning = {"type": "tag", "begin": "", "content": text, "end": MARKERS[0]}
    lead = {"type": "const_string", "value": GRAMMARS_LEAD}
    answer = structured_outputs_to_format(grammar).model_dump()
    if answer["type"] == "json_schema":
        answer["max_whitespace_cnt"] = MOST_WHITESPACE
    whole = {"type": "structural_tag", "format": {"type": "sequence", "elements": [reasoning, lead, answer]}}
    tag = json.dumps(whole)
    Grammar.from_structural_tag(tag)  # vLLM would try another back end, and tell of that one's trouble
    return StructuredOutputsParams(structural_tag=tag)
