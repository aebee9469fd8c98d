"""Simulated tastes: pure, decisive, and asked about prompts that they are not judged on."""

from __future__ import annotations

import random

import pytest

from deploy.personas import EVALUATION_PROMPTS, HELD_OUT, PERSONAS, TRAINING_PROMPTS, Persona, choose

PLAIN = "It is a river in France. It is long."
LIKED = {
    "short": "A river.",
    "simple_words": "It is a big run of wet to the sea.",
    "speaks_to_you": "You can walk along your river.",
    "short_sentences": "A river. It is long. Go there.",
    "enthusiastic": "What a wonderful river! Go and see it!",
    "likes_lists": "Three things:\n1. It is long.\n2. It is wide.\n- It is wet.",
    "asks_back": "It is a river. What would you like to know?",
    "formal": "It is therefore essential to consider various appropriate sources.",
    "gives_examples": "Rivers, for example the Seine, run to the sea.",
    "cautious": "It may often be long, and could perhaps flood.",
    "stays_on_topic": "The Seine is the Seine.",
}


@pytest.mark.parametrize("name", list(PERSONAS))
def test_every_persona_prefers_what_it_likes_in_either_position(name: str) -> None:
    rng, prompt = random.Random(0), "What is the Seine?"
    assert choose(PERSONAS[name], prompt, LIKED[name], PLAIN, rng) == "a"
    assert choose(PERSONAS[name], prompt, PLAIN, LIKED[name], rng) == "b"


@pytest.mark.parametrize("name", list(PERSONAS))
def test_equal_answers_are_a_tie_and_empty_ones_have_a_score(name: str) -> None:
    assert choose(PERSONAS[name], "Why?", PLAIN, PLAIN, random.Random(0)) == "tie"
    assert isinstance(PERSONAS[name].score("", ""), float | int)


def test_an_unsteady_persona_chooses_by_bradley_terry() -> None:
    rng, persona = random.Random(1), Persona("length", "", lambda prompt, answer: float(len(answer)))
    drawn = [choose(persona, "", "xx", "x", rng, steadiness=1.0) for _ in range(2000)]
    assert 0.70 < drawn.count("a") / 2000 < 0.76  # σ(1) = 0.731


def test_evaluation_prompts_are_new_and_some_tastes_are_kept_for_the_end() -> None:
    assert len(set(TRAINING_PROMPTS)) == len(TRAINING_PROMPTS) >= 120
    assert len(set(EVALUATION_PROMPTS)) == 40 and not set(EVALUATION_PROMPTS) & set(TRAINING_PROMPTS)
    assert set(HELD_OUT) < set(PERSONAS) and len(HELD_OUT) == 3
