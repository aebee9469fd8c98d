"""The output filter: a completion that matches one of the configured patterns is stopped and marked unsafe.

Small on purpose: a last line of defence that costs microseconds, not a moderation model. What was streamed
before the match stays with the client; the matched text never leaves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

DEFAULT_PATTERNS = (
    r"\bkill yourself\b",
    r"\b(?:build|make) (?:a|an) (?:pipe )?bomb\b",
    r"\bsynthesi[sz]e (?:sarin|ricin|vx nerve agent)\b",
)
WINDOW = 256  # characters before a new piece that a match may begin in


class OutputFilter:
    """Finds the first forbidden place in a growing text. Stateless, shared by all completions."""

    def __init__(self, patterns: Sequence[str]) -> None:
        joined = "|".join(f"(?:{pattern})" for pattern in patterns)
        self._pattern = re.compile(joined, re.IGNORECASE) if patterns else None

    def find(self, text: str, new_from: int) -> int | None:
        """Where a match begins in ``text`` whose part before ``new_from`` was looked at before, else None."""
        if self._pattern is None:
            return None
        match = self._pattern.search(text, max(0, new_from - WINDOW))
        return match.start() if match else None
