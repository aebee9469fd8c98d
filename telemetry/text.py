"""Numbers about text that guards, trainer and router share: pure, no model."""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Lower-case words and single punctuation marks."""
    return _WORD.findall(text.lower())


def repetition_ratio(text: str, n: int = 3) -> float:
    """Share of word n-grams that occurred before in the same text, 0–1; 0 for texts shorter than n words."""
    tokens = words(text)
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
