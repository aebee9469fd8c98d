"""From token ids to the text that may be sent: whole characters, no stop string, nothing unsafe.

Tokens are pieces of UTF-8, and a stop string may span tokens, so some text waits until it is known to be
harmless. What was sent, joined, always equals the text of the finished completion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from serving.safety import OutputFilter

REPLACEMENT = "\ufffd"


class Detokenizer:
    """Incremental decoding: each push returns the characters that became whole with this token."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # first token of the window that is decoded again each time
        self._read = 0  # tokens whose text was returned

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; empty inside a character of several bytes."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        if now.endswith(REPLACEMENT) or len(now) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def finish(self) -> str:
        """What is left, bytes that never became a character shown as U+FFFD."""
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        self._start = self._read = len(self._ids)
        return now[len(before) :]


class OutputText:
    """The visible text of one completion. After ``is_stopped`` or ``is_unsafe`` nothing more comes."""

    def __init__(self, stops: Sequence[str], output_filter: OutputFilter) -> None:
        self._stops = tuple(stops)
        self._filter = output_filter
        self._text = ""
        self._sent = 0
        self.is_stopped = False
        self.is_unsafe = False

    def push(self, piece: str, *, is_last: bool = False) -> str:
        """Add ``piece``; returns what may be sent now, everything harmless when it ``is_last``."""
        if self.is_stopped or self.is_unsafe:
            return ""
        looked_at = len(self._text)
        self._text += piece
        end = len(self._text) if is_last else len(self._text) - self._held_back()
        if (stop := self._find_stop(looked_at)) is not None:
            self.is_stopped, end = True, stop
        if (unsafe := self._filter.find(self._text[: stop if stop is not None else None], looked_at)) is not None:
            self.is_stopped, self.is_unsafe, end = False, True, min(end, unsafe)
        sent, self._sent = self._sent, max(self._sent, end)
        return self._text[sent : self._sent]

    def _find_stop(self, looked_at: int) -> int | None:
        found = [self._text.find(stop, max(0, looked_at - len(stop) + 1)) for stop in self._stops]
        return min((place for place in found if place >= 0), default=None)

    def _held_back(self) -> int:
        """Characters at the end that could be the beginning of a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
