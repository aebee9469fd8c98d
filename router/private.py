"""People's texts on their way to what is written, and back, without holding up the event loop.

What may wait (a key that must be made or unwrapped, a redactor that is a model) waits in a thread.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Sequence
from typing import Any, Final, TypeVar

from telemetry.conversation import prompt_cluster
from telemetry.events import Message
from telemetry.people import Forgotten, KeysAway, KeyUnusable
from telemetry.redaction import Redactor
from telemetry.sealing import SHAPES, Sealer, Shape

R = TypeVar("R")
LONG_CHARS: Final = 4_000  # texts longer than this are redacted in a thread, too
NOT_TO_BE_READ: Final = (Forgotten, KeyUnusable, KeysAway)


class Private:
    """One router's sealer and redactor."""

    def __init__(self, sealer: Sealer, redactor: Redactor, key: bytes = b"") -> None:
        """``key``: of the keyed hashes that stand where a text would tell too much."""
        self.sealer, self._redactor, self._key = sealer, redactor, key

    def cluster(self, prompt: Sequence[Message]) -> str:
        """The cluster of similar prompts, 12 hex digits that tell nobody a word of it."""
        return hmac.new(self._key, b"cluster:" + prompt_cluster(prompt).encode(), hashlib.sha256).hexdigest()[:12]

    def key_now(self, user: str) -> str:
        """The id of the user's key as it is now; empty where there is none, or where it cannot be told."""
        try:
            return self.sealer.key_id(user)
        except (OSError, KeyUnusable):
            return ""

    async def key_of(self, user: str) -> str:
        """The id of the user's key, which exists from here on. Raises KeyUnusable, KeysAway or OSError."""
        if not self.sealer.is_sealing:
            return ""
        return self.key_now(user) or await asyncio.to_thread(self.sealer.prepare, user)

    async def redacted(self, record: R, shape: Shape) -> R:
        """A record of this shape without what the configuration takes out."""
        found: R = await self._run(_length(record), self._redactor.record, record, shape)
        return found

    async def text(self, text: str) -> str:
        """A text of its own."""
        found: str = await self._run(len(text), self._redactor.text, text)
        return found

    async def sealed(self, event: R, key_id: str = "") -> R:
        """The event as it is written. Raises one of NOT_TO_BE_READ."""
        if type(event) not in SHAPES or event.sealed is not None or not self.sealer.is_sealing:  # type: ignore[attr-defined]
            return event
        await self._unwrapped(event.user)  # type: ignore[attr-defined]
        return self.sealer.seal(event, key_id=key_id)  # type: ignore[type-var]

    async def opened(self, event: R) -> R:
        """The event with its texts. Raises one of NOT_TO_BE_READ."""
        if type(event) not in SHAPES or event.sealed is None:  # type: ignore[attr-defined]
            return event
        await self._unwrapped(event.user)  # type: ignore[attr-defined]
        return self.sealer.open(event)  # type: ignore[type-var]

    async def sealed_bytes(self, user: str, text: bytes, name: str, key_id: str) -> bytes:
        """``text`` as it is written. Raises one of NOT_TO_BE_READ."""
        if self.sealer.is_sealing:
            await self._unwrapped(user)
        return self.sealer.seal_bytes(user, text, name, key_id=key_id)

    async def opened_bytes(self, sealed: bytes, name: str) -> bytes:
        """The inverse of ``sealed_bytes``; whose key is needed stands in them."""
        return await asyncio.to_thread(self.sealer.open_bytes, sealed, name)

    async def _unwrapped(self, user: str) -> None:
        if self.sealer.keys is not None and self.sealer.must_wait(user):
            await asyncio.to_thread(self.sealer.keys.find, user)

    async def _run(self, chars: int, redact: Any, *arguments: Any) -> Any:
        if self._redactor.has_hook or chars > LONG_CHARS:
            return await asyncio.to_thread(redact, *arguments)
        return redact(*arguments)


def _length(record: Any) -> int:
    """Characters of all that a redactor reads."""
    texts = [message.content for message in record.prompt]
    texts += [call.arguments for message in record.prompt for call in message.tool_calls]
    sides = (getattr(record, name, None) for name in ("a", "b", "completion", "chosen", "rejected"))
    texts += [side.text for side in sides if side is not None]
    return sum(map(len, texts)) + len(getattr(record, "comment", ""))
