"""Messages into token ids by the model's own chat template, and what ends an answer. Holds the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2

from serving.errors import InvalidRequest, UnsupportedModel
from telemetry.events import Message


class PromptEncoder:
    """Wraps a transformers tokenizer; ``end_ids`` are the tokens that end an answer."""

    def __init__(self, tokenizer: Any, generation_config: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UnsupportedModel("the model's tokenizer has no chat template; use a chat (instruct) model")
        self._tokenizer = tokenizer
        ends = getattr(generation_config, "eos_token_id", None)
        self.end_ids = frozenset([*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]) - {None}

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the whole prompt, the answer's opening included; raises InvalidRequest."""
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"messages: the model's chat template refuses them: {error}") from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``, special tokens left out."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def token_text(self, token_id: int) -> str:
        """How one token alone reads; bytes that are no character read as U+FFFD."""
        text: str = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        return text
