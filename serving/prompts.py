"""Messages and tools into token ids by the model's own chat template, and what ends an answer. Holds the tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jinja2

from serving.errors import InvalidRequest, UnsupportedModel, UnsupportedTools
from serving.tool_calls import CLOSE, OPEN, CallReader
from telemetry.conversation import conversation, needs_tools, tools_of
from telemetry.events import Message, Tool, ToolCall

_PROBE = (
    Message("user", "Probe?", tools=(Tool("probe_function", "Probes.", '{"type": "object", "properties": {}}'),)),
    Message("assistant", "", tool_calls=(ToolCall("probe_id", "probe_function", '{"probe": 1}'),)),
    Message("tool", "probe_result", tool_call_id="probe_id"),
)


class PromptEncoder:
    """Wraps a transformers tokenizer; ``end_ids`` are the tokens that end an answer.

    ``takes_tools``: the chat template says which tools there are, renders calls so that ``serving.tool_calls`` reads
    them (what a template renders is what its model was trained to write), and renders their results.
    """

    def __init__(self, tokenizer: Any, generation_config: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UnsupportedModel("the model's tokenizer has no chat template; use a chat (instruct) model")
        self._tokenizer, self._decode = tokenizer, _decoder(tokenizer)
        self._texts: dict[int, str] = {}  # of single tokens, at most one for each of the vocabulary
        ends = getattr(generation_config, "eos_token_id", None)
        self.end_ids = frozenset([*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]) - {None}
        self.end_id: int | None = tokenizer.eos_token_id  # the one that learners take for an answer's end
        added = tokenizer.added_tokens_decoder.items()
        self._unseen_ids = frozenset(i for i, token in added if token.special and token.content not in (OPEN, CLOSE))
        self.takes_tools = self._takes_tools()

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the whole prompt, the answer's opening included; raises InvalidRequest, or UnsupportedTools."""
        if not self.takes_tools and needs_tools(messages):
            raise UnsupportedTools()
        try:
            text = self._render(messages)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"messages: the model's chat template refuses them: {error}") from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``, special tokens left out, but for those that mark a tool call."""
        seen = [token_id for token_id in ids if token_id not in self._unseen_ids]
        return self.token_text(seen[0]) if len(seen) == 1 else self._decode(seen)

    def token_text(self, token_id: int) -> str:
        """How one token alone reads; bytes that are no character read as U+FFFD."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._decode([token_id])
        return text

    def _render(self, messages: Sequence[Message]) -> str:
        text: str = self._tokenizer.apply_chat_template(
            conversation(messages), tools=tools_of(messages), add_generation_prompt=True, tokenize=False
        )
        return text

    def _takes_tools(self) -> bool:
        try:
            offer, whole = self._render(_PROBE[:1]), self._render(_PROBE)
        except (jinja2.TemplateError, TypeError, ValueError):  # it does not know these messages
            return False
        (_, calls) = CallReader(("probe_function",)).push(whole, is_last=True)
        return "probe_function" in offer and len(calls) == 1 and "probe_result" in whole


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """``tokenizer.decode`` without cleaning; straight from the Rust tokenizer where transformers only hands on."""
    from transformers import PreTrainedTokenizerFast as Fast

    kind = type(tokenizer)
    if isinstance(tokenizer, Fast) and (kind.decode, kind._decode) == (Fast.decode, Fast._decode):
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=False)
    return partial(tokenizer.decode, clean_up_tokenization_spaces=False)
