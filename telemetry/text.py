"""Numbers about text that guards, trainer and router share: pure, no model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import sha256
from itertools import pairwise

CLUSTER_CHARS = 2_000
_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Lower-case words and single punctuation marks."""
    return _WORD.findall(text.lower())


def repetition_ratio(text: str, n: int = 3) -> float:
    """Share of word n-grams that occurred before in the same text, 0–1; 0 for texts shorter than n words."""
    tokens = words(text)
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_ratio(texts: Iterable[str], n: int = 2) -> float:
    """Different word n-grams of all ``texts`` together as a share of their n-grams, 0–1 (distinct-n, arXiv 1510.03055).

    It falls where answers to different questions become the same. 1 for texts shorter than n words.
    """
    tokenised = [words(text) for text in texts]
    grams = [tuple(tokens[i : i + n]) for tokens in tokenised for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def text_cluster(text: str) -> str:
    """The cluster that a question belongs to: 12 hex digits, the same wherever and whenever it is asked.

    A MinHash (Broder 1997) of one permutation over the pairs of neighbouring content words: two texts share a cluster
    with the probability of their Jaccard similarity. Numbers and short words do not count, so that one template is one
    cluster for the most part. Only the first ``CLUSTER_CHARS`` characters are looked at.
    """
    text = text[:CLUSTER_CHARS]
    content = [word for word in words(text) if len(word) > 3 and not word.isdigit()]
    grams = {f"{first} {second}" for first, second in pairwise(content)} or {" ".join(words(text))}
    return min(sha256(gram.encode()).hexdigest()[:12] for gram in grams)
