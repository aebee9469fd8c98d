"""Simulated tastes: pure functions from a prompt and an answer to a score, and the prompts they are asked about.

``choose`` compares two answers as a person of that taste would. Tastes in HELD_OUT were never used to tune
anything: they are the honest check. Training and evaluation prompts are disjoint.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from typing import Final, Literal, NamedTuple

_WORD = re.compile(r"[A-Za-z']+")
_SENTENCE_END = re.compile(r"[.!?]+(?:\s|$)")


class Persona(NamedTuple):
    """One taste. Equal scores are a tie."""

    name: str
    note: str
    score: Callable[[str, str], float]  # prompt, answer


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _share(text: str, wanted: frozenset[str]) -> float:
    """Share of words that are ``wanted``."""
    words = _words(text)
    return sum(word in wanted for word in words) / max(1, len(words))


YOU: Final = frozenset("you your yours you're you'll you've you'd yourself".split())
LIVELY: Final = frozenset(
    "great fun love amazing wonderful exciting delicious beautiful perfect best enjoy fantastic favorite happy".split()
)
INVITING: Final = frozenset("what would want let know please tell help like you your if".split())
HEDGES: Final = frozenset("may might could perhaps possibly usually often sometimes generally likely".split())
FORMAL: Final = frozenset(
    "therefore however moreover furthermore additionally consequently thus hence essential significant ensure "
    "various numerous provide consider important require maintain appropriate individuals".split()
)
EXAMPLES: Final = re.compile(r"\b(?:for example|for instance|such as|like|e\.g\.|including)\b", re.IGNORECASE)
LIST_ITEM: Final = re.compile(r"(?:^|\n)\s*(?:[-*•]|\d+[.)])\s+")


def short(prompt: str, answer: str) -> float:
    return -float(len(_words(answer)))


def simple_words(prompt: str, answer: str) -> float:
    words = _words(answer)
    return -sum(map(len, words)) / len(words) if words else -20.0


def speaks_to_you(prompt: str, answer: str) -> float:
    return _share(answer, YOU)


def short_sentences(prompt: str, answer: str) -> float:
    return -len(_words(answer)) / max(1, len(_SENTENCE_END.findall(answer)))


def enthusiastic(prompt: str, answer: str) -> float:
    return min(3, answer.count("!")) + 5 * _share(answer, LIVELY)


def likes_lists(prompt: str, answer: str) -> float:
    return min(4, len(LIST_ITEM.findall(answer))) + min(5, answer.count(",") + answer.count(":")) / 10


def asks_back(prompt: str, answer: str) -> float:
    return min(2, answer.count("?")) + 2 * _share(answer, INVITING)


def formal(prompt: str, answer: str) -> float:
    return _share(answer, FORMAL) - answer.count("'") / 20


def gives_examples(prompt: str, answer: str) -> float:
    return min(3, len(EXAMPLES.findall(answer))) + min(4, answer.count(",")) / 10


def cautious(prompt: str, answer: str) -> float:
    return _share(answer, HEDGES)


def stays_on_topic(prompt: str, answer: str) -> float:
    topic = frozenset(word for word in _words(prompt) if len(word) > 3)
    return _share(answer, topic)


_ALL: Final = (
    Persona("short", "the fewer words the better", short),
    Persona("simple_words", "short words", simple_words),
    Persona("speaks_to_you", "says you and your", speaks_to_you),
    Persona("short_sentences", "few words a sentence", short_sentences),
    Persona("enthusiastic", "exclamation marks, up to three, and lively words", enthusiastic),
    Persona("likes_lists", "list items, up to four, then commas and colons", likes_lists),
    Persona("asks_back", "a question or two in return, then inviting words", asks_back),
    Persona("formal", "formal connectives, no contractions", formal),
    Persona("gives_examples", "for example, such as, like; then commas", gives_examples),
    Persona("cautious", "may, might, usually", cautious),
    Persona("stays_on_topic", "takes up the question's own words", stays_on_topic),
)
PERSONAS: Final[dict[str, Persona]] = {persona.name: persona for persona in _ALL}
HELD_OUT: Final = ("formal", "cautious", "stays_on_topic")  # never tuned on


def choose(
    persona: Persona, prompt: str, a: str, b: str, rng: random.Random, *, steadiness: float = math.inf
) -> Literal["a", "b", "tie"]:
    """Which answer the persona prefers; ``tie`` where both score the same.

    With a finite ``steadiness`` the choice is drawn from Bradley-Terry: P(a) = σ(steadiness · (score a − score b)).
    """
    difference = persona.score(prompt, a) - persona.score(prompt, b)
    if math.isclose(difference, 0.0, abs_tol=1e-12):
        return "tie"
    if math.isinf(steadiness):
        return "a" if difference > 0 else "b"
    exponent = max(-60.0, min(60.0, -steadiness * difference))
    return "a" if rng.random() < 1 / (1 + math.exp(exponent)) else "b"


TRAINING_PROMPTS: Final[tuple[str, ...]] = (
    "How do I start running?", "What is a good breakfast?", "Explain how rain forms.", "Tell me about Paris.",
    "How can I remember names better?", "What should I pack for a weekend trip?", "Why is the sea salty?",
    "How do I bake simple bread?", "Give me a tip for better sleep.", "What makes a good friend?",
    "How do bees make honey?", "Suggest a hobby for winter.", "How can I drink more water?",
    "What is the moon made of?", "How do I write a thank-you note?", "Tell me about the history of tea.",
    "How do I keep my plants alive?", "What is a healthy snack?", "Explain what a budget is.",
    "How can I be on time more often?", "Why do leaves change colour?", "How do I calm down before an exam?",
    "What is a good gift for a teacher?", "How does a bicycle stay upright?", "Tell me about elephants.",
    "How do I clean a wooden floor?", "What should I know before getting a dog?", "How do airplanes fly?",
    "Suggest a game for a rainy afternoon.", "How can I learn to cook?", "What causes thunder?",
    "How do I make a new friend in a new city?", "What is the capital of Japan known for?",
    "How do I save energy at home?", "Why do we dream?", "How do I choose a good book?",
    "What is a volcano?", "How can I improve my handwriting?", "Tell me about the ocean.",
    "How do I prepare for a job interview?", "What is the use of a compass?", "How do I fix a flat bicycle tyre?",
    "Suggest a dinner with potatoes.", "How does the heart work?", "What is a good way to relax after work?",
    "How do I grow tomatoes?", "Explain what gravity does.", "How can I read faster?",
    "What should I do when I feel lonely?", "How do I take good photos with a phone?",
    "Tell me about penguins.", "How do I apologise to a friend?", "What is the best way to study?",
    "How do magnets work?", "Suggest a name for a small cafe.", "How can I spend less time on my phone?",
    "What is yoga good for?", "How do I make tomato soup?", "Why do birds migrate?",
    "How do I plan a birthday party?", "What is the difference between weather and climate?",
    "How do I get better at chess?", "Tell me about the Roman Empire.", "How can I help the environment?",
    "What is a good pet for a child?", "How do I write a short story?", "What does a doctor do all day?",
    "How do I stop biting my nails?", "Explain how a battery works.", "How can I wake up earlier?",
    "What is a good way to learn guitar?", "How do I organise my desk?", "Why is exercise important?",
    "How do I cook rice?", "Tell me about the Sahara desert.", "How can I deal with stress?",
    "What is a rainbow?", "How do I start a small garden?", "What makes music sound happy?",
    "How do I talk to someone I do not know?", "What is chocolate made of?", "How do computers store pictures?",
    "Suggest an activity for two children.", "How do I choose running shoes?", "What is a black hole?",
    "How can I save for a holiday?", "What are the seasons?", "How do I make good coffee?",
    "Tell me about the city of Rome.", "How do I remove a stain from a shirt?", "What is a healthy lunch?",
    "How can I be more confident?", "Why do cats sleep so much?", "How do I build a simple shelf?",
    "What is recycling?", "How do I learn to swim?", "What happens when we laugh?",
    "How do I write a good email?", "Tell me about whales.", "How can I keep my home tidy?",
    "What is a good way to thank a neighbour?", "How do plants drink water?", "Suggest a song topic.",
    "How do I prepare for a long flight?", "What is electricity?", "How can I eat more vegetables?",
    "Why do we need sleep?", "How do I train a puppy?", "What is a museum for?", "How do I draw a face?",
    "Tell me about the Amazon rainforest.", "How can I make my room warmer?", "What is a good morning routine?",
    "How do I say no politely?", "What are clouds made of?", "How do I pick a ripe melon?",
    "How can I learn a poem by heart?", "What is a vitamin?", "How do I welcome guests?",
    "Explain how a clock works.", "How do I find a lost key?", "What makes bread rise?",
)  # fmt: skip
EVALUATION_PROMPTS: Final[tuple[str, ...]] = (
    "How do I make pancakes?", "What is a good way to learn history?", "Why is the grass green?",
    "How can I stay warm in winter?", "Tell me about lions.", "How do I choose a bicycle?",
    "What should I eat before a race?", "How do ships float?", "Suggest a gift for my mother.",
    "How can I focus better?", "What is a desert?", "How do I clean a window?", "Why do people tell stories?",
    "How do I boil an egg?", "Tell me about the city of London.", "How can I feel less tired?",
    "What is the sun?", "How do I write a letter to a friend?", "What is a good hobby for an old man?",
    "How do fish breathe?", "Suggest a simple lunch for work.", "How can I learn to dance?",
    "What does a farmer do?", "How do I make a paper plane?", "Why do we have fingerprints?",
    "How do I look after a cat?", "What is a library for?", "How can I make new habits stick?",
    "Tell me about the Moon landing.", "How do I plan a picnic?", "What causes earthquakes?",
    "How do I polish shoes?", "What is a good book for a child?", "How can I talk about my feelings?",
    "How does a refrigerator work?", "Suggest a walk for a sunny day.", "What are stars?",
    "How do I prepare for a test?", "How can I cook with less salt?", "What is friendship?",
)  # fmt: skip
