"""Reasoning and answer of a model without <think> tags: QVQ reasons in prose and then writes `**Final Answer**`.

Built on vLLM's parser engine. The first marker ends the reasoning; the marker itself is dropped, as <think> tags are.
Where there is none, `reasoning` is the whole text and `content` repeats its conclusion, at the end.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.parser.engine.events import EventType, SemanticEvent
from vllm.parser.engine.parser_engine_config import ParserEngineConfig, ParserState, Transition
from vllm.parser.engine.streaming_parser_engine import StreamingParserEngine
from vllm.reasoning import ReasoningParser

from qvq_serve.engine import PARSER, launched_profile
from qvq_serve.hooks import CONTEXT
from qvq_serve.hooks.answer import conclusion
from qvq_serve.hooks.governing import GOVERNED, Act, act
from qvq_serve.hooks.markers import BOLD, BOLD_LEAD, ENDED, GRAMMARS_LEAD, LEAD, MARKERS, MAYBE_LEAD
from qvq_serve.hooks.request import BEHIND, is_answering, most_tokens

TURN, TURN_START = "<|im_start|>", "<|im_start|>assistant\n"
PARSERS = "qvq_parsers"
"""Where a request's context keeps its parsers."""
PROMPT_TOKENS = "qvq_prompt_tokens"
"""Where it keeps the prompt's length, which vLLM shows to the first choice's parser alone."""
STREAMING = "qvq_streaming"
"""What a request's context has once its stream begins, and with it the parsers of its choices."""


CONFIG = ParserEngineConfig(
    name=PARSER,
    initial_state=ParserState.REASONING,
    terminals={"THINK_END": BOLD, "PLAIN": tuple(marker for marker in MARKERS if marker not in BOLD)},
    transitions={
        (ParserState.REASONING, "THINK_END"): Transition(ParserState.CONTENT, (EventType.REASONING_END,)),
        (ParserState.REASONING, "PLAIN"): Transition(ParserState.CONTENT),  # so that the two can be told apart
    },
)
"""vLLM's description of a format: reasoning, a marker, and the answer. A thinking budget writes the first marker."""


@dataclass
class Parsed:
    """What was told apart in one choice: whether it has an answer of its own, after a marker; and tokens."""

    marked: bool
    reasoning_tokens: int
    tokens: int
    reasoning: str = ""
    """Its text, where the client wants none too."""
    act: Act | None = None
    """What the governor did."""


class QvqReasoningParser(ReasoningParser):  # type: ignore[misc]
    """One for each choice, and some that vLLM makes to look at the prompt only.

    Over the engine alone, which gets text and no token ids, rather than vLLM's adapter, which prepares for special
    tokens at each request: QVQ's markers have none, and they are not in the text.
    """

    engine_based_streaming = True

    def __init__(self, tokenizer: Any, *args: Any, **options: Any) -> None:
        super().__init__(tokenizer, *args, **options)
        self.special = frozenset(tokenizer.all_special_ids)
        self.answering = self.streaming = False
        self.results: list[Parsed] = []
        self.clear()
        self.context = CONTEXT.get()
        if context := self.context:
            context.state.setdefault(PARSERS, []).append(self)
            self.streaming = STREAMING in context.state
            self.answering = is_answering(context.request)  # vLLM shows the prompt to the first choice's alone

    def clear(self) -> None:
        """Ready for the text of another choice."""
        self.engine = StreamingParserEngine(CONFIG, None)
        self.raw = self.space = ""
        self.sent = {"reasoning": "", "content": ""}
        self.ids: list[int] = []
        self.before: int | None = None
        """Tokens before the marker, once it was found."""
        self.marked = False
        self.lead: str | None = None
        self.bold = self.unclosed = False
        """Whether the marker opened a bold text; whether the answer is in it, and closes it."""
        self.star = ""
        """What may be half of that."""

    @property
    def reasoning_start_str(self) -> str:
        """Found in the prompt, so that a thinking budget counts from the first token."""
        return TURN_START

    @property
    def reasoning_end_str(self) -> str:
        """What a thinking budget writes, and the model closes."""
        return MARKERS[0]

    def has_engine_confirmed_reasoning_end(self) -> bool:
        """Never, so that the answer comes here as well, and what is left of the marker can be cut off in a stream."""
        return False

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether the last turn of a prompt has a marker: an answer that is to be continued.

        Never to a stream, which would send such an answer past its parser, where nobody could count it.
        """
        turn, ids = self.vocab.get(TURN), list(input_ids)
        if self.context:
            self.context.state[PROMPT_TOKENS] = len(ids)
        start = len(ids) - ids[::-1].index(turn) if turn in ids else 0
        self.answering = bool(ENDED.search(self.model_tokenizer.decode(ids[start:])))
        return self.answering and not self.streaming

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        return input_ids

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        if self.answering:
            return None, model_output
        self.clear()
        pieces = [self.fed(model_output), self.finish_streaming()]
        reasoning, content = (
            "".join(getattr(piece, part) or "" for piece in pieces if piece) or None
            for part in ("reasoning", "content")
        )
        return reasoning, content

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        self.ids += delta_token_ids
        if self.answering:
            self.sent["content"] += delta_text
            return DeltaMessage(content=delta_text) if delta_text else None
        return self.fed(delta_text)

    def fed(self, text: str) -> DeltaMessage | None:
        """What a piece of text lets out."""
        return self.shaped(self.engine.feed(text, ()))

    def finish_streaming(self) -> DeltaMessage | None:
        return self.shaped(self.engine.finish(), last=True)

    def shaped(self, events: Sequence[SemanticEvent], last: bool = False) -> DeltaMessage | None:
        """Without space at the reasoning's end, and without what is left of the marker before the answer."""
        sent = answer = ""
        for event in events:
            if event.type is EventType.REASONING_CHUNK:
                self.raw += event.value
                self.space += event.value
            elif event.type is EventType.REASONING_END:
                self.bold = True
            elif event.type is EventType.TEXT_CHUNK:
                if not self.marked:
                    self.marked, self.lead = True, ""
                if self.lead is None:
                    answer += event.value
                else:
                    self.lead += event.value
        if self.space and not self.space.isspace():
            sent = self.space.rstrip()
            self.space = self.space[len(sent) :]
        grammar = self.context is not None and BEHIND in self.context.state
        if self.lead is not None and grammar:
            if last or len(self.lead) >= len(GRAMMARS_LEAD):
                cut = GRAMMARS_LEAD.startswith(self.lead)
                answer, self.lead = "" if cut else self.lead.removeprefix(GRAMMARS_LEAD), None
        elif self.lead is not None and (last or not MAYBE_LEAD.fullmatch(self.lead)):
            lead = (BOLD_LEAD if self.bold else LEAD).match(self.lead)
            assert lead  # of nothing, at least
            self.unclosed = self.bold and not re.search(r"\*\*|\n", lead[0])
            answer, self.lead = self.lead[lead.end() :], None
        if self.unclosed or self.star:
            answer = self.without_end_of_bold(answer, last)
        if last and not (self.sent["content"] or answer or (grammar and self.marked)):
            answer, self.marked = conclusion(self.raw), False
        self.sent["reasoning"] += sent
        self.sent["content"] += answer
        shown = {name: text for name, text in (("reasoning", sent), ("content", answer)) if text}
        return DeltaMessage(**shown) if shown else None

    def without_end_of_bold(self, text: str, last: bool) -> str:
        """The answer of `**Final Answer: 42**`, which is within the marker's bold: without the ** at its line's end."""
        text, self.star = self.star + text, ""
        if end := re.search(r"\*\*|\n", text):
            self.unclosed = False
            before = text[: end.start()] or self.sent["content"]
            closes = end[0] == "**" and before and not before[-1].isspace()  # else it opens another
            return text[: end.start()] + text[end.start() + 2 :] if closes else text
        if text.endswith("*") and not last:
            text, self.star = text[:-1], "*"
        return text

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """Called by vLLM for each choice when it is finished, and of a stream, if a client likes, for each chunk."""
        if self.streaming:
            return self.reasoning_tokens(token_ids)
        counted = self.parsed(token_ids)
        self.results.append(counted)
        return counted.reasoning_tokens

    def parsed(self, token_ids: Sequence[int] | None = None) -> Parsed:
        """What was told apart in the choice that was fed last; its tokens are those given, or those of the stream."""
        ids = list(self.ids if token_ids is None else token_ids)
        if self.answering:
            return Parsed(True, 0, len(ids))
        reasoning_tokens = self.reasoning_tokens(ids)
        act = self.act(ids, reasoning_tokens if self.marked else len(ids))
        return Parsed(self.marked, reasoning_tokens, len(ids), self.sent["reasoning"], act)

    def reasoning_tokens(self, ids: Sequence[int]) -> int:
        """Of the reasoning: those before the marker, or, where there is none, all but special ones at the end."""
        if self.answering:
            return 0
        if not self.marked:
            return len(ids) - next((i for i, token in enumerate(reversed(ids)) if token not in self.special), len(ids))
        if self.before is None:
            # A byte-level token's spelling has a character for each of its bytes; a special one leaves no text.
            left, self.before = len(self.raw.encode()) - 2 * self.raw.count("\ufffd"), 0
            for token, spelling in zip(ids, self.model_tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
                left -= 0 if spelling is None or token in self.special else len(spelling)  # None: beyond the tokenizer
                if left < 0:
                    break
                self.before += 1
        return self.before

    def act(self, ids: list[int], answer: int) -> Act | None:
        """What the governor did to the choice, its answer beginning at one of its tokens."""
        if not self.context or not (given := self.context.state.get(GOVERNED)):
            return None
        given = given.of(
            most_tokens(self.context.request, launched_profile(), self.context.state.get(PROMPT_TOKENS, 0))
        )
        return act(given, self.model_tokenizer, ids, answer)
