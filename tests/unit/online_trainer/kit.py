"""A tiny seeded model, its policy, and verdicts: what the trainer's tests are made of."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import msgspec

from deploy.models import make_tiny
from online_trainer.batches import PairTokens
from online_trainer.config import TrainerConfig
from online_trainer.ingest import Intake, IntakeState, is_held_out
from online_trainer.policy import Policy, load_model
from telemetry.events import Completion, FeedbackRecorded, Message, Outcome, PreferenceRecorded

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
CONFIG = TrainerConfig(
    base="tiny", dtype="float32", rank=4, layers=1, batch_pairs=4, replay_pairs=2, flush_s=5.0, heldout_ratio=0.0,
    probe_tokens=6, probes=("Hello?", "Who are you?"), publish_interval_s=0.0, learning_rate=1e-2, rehearse_s=3600.0,
)  # fmt: skip


def tiny_folder(path: Path) -> Path:
    """A 2-layer random Llama with its tokenizer."""
    folder = path / "tiny"
    make_tiny(7, folder)
    return folder


def tiny_policy(folder: Path, config: TrainerConfig = CONFIG) -> Policy:
    model, tokenizer = load_model(folder, "float32")
    return Policy(
        model, tokenizer,
        rank=config.rank, alpha=config.alpha, layers=config.layers, targets=config.targets, seed=config.seed,
    )  # fmt: skip


def completion(text: str, *, finish_reason: str = "stop", version: str = "v000000-00000000") -> Completion:
    return Completion(
        completion_id=f"c-{text}", text=text, variant="chat-main", version=version, channel="stable",
        finish_reason=finish_reason, prompt_tokens=5, completion_tokens=5, ttft_s=0.1, duration_s=0.2,
        temperature=0.7, top_p=0.95,
    )  # fmt: skip


def verdict(
    number: int,
    *,
    user: str = "",
    chosen: str = "yes yes!",
    rejected: str = "no no",
    outcome: Outcome = "chosen_rejected",
    prompt: str = "",
    policy: str = "chat",
    version: str = "v000000-00000000",
) -> PreferenceRecorded:
    """Verdict ``number``, given ``number`` seconds after START by a user of its own."""
    return PreferenceRecorded(
        event_id=f"preference-{number}",
        occurred_at=START + timedelta(seconds=number),
        pair_id=f"pair-{number}",
        policy=policy,
        user=user or f"user-{number}",
        prompt=(Message(role="user", content=prompt or f"question {number}"),),
        chosen=completion(chosen, version=version),
        rejected=completion(rejected, version=version),
        outcome=outcome,
        chosen_position="a" if outcome == "chosen_rejected" else "",
        propensity=1.0,
        shown_at=START,
        decided_s=1.0,
    )


def thumb(number: int, *, rating: Literal[1, -1] = 1, text: str = "yes yes!", prompt: str = "") -> FeedbackRecorded:
    """Thumb ``number`` on a single answer."""
    return FeedbackRecorded(
        event_id=f"thumb-{number}-{rating}",
        occurred_at=START + timedelta(seconds=number),
        completion_id=f"completion-{number}",
        policy="chat",
        user=f"user-{number}",
        prompt=(Message(role="user", content=prompt or f"question {number}"),),
        completion=completion(text),
        rating=rating,
    )


def intake(state: IntakeState | None = None, **settings: object) -> Intake:
    """An intake that holds nothing out unless told."""
    defaults = {"policy": "", "heldout_ratio": 0.0, "heldout_window": 4, "replay_window": 6}
    return Intake(state or IntakeState(), **{**defaults, **settings})  # type: ignore[arg-type]


def prompt_that_is(held_out: bool, ratio: float = 0.1) -> str:
    """A question on the wanted side of the split."""
    candidates = (f"question about thing{n}" for n in range(1000))
    return next(c for c in candidates if is_held_out((Message(role="user", content=c),), ratio) is held_out)


def tokens(prompt: int, chosen: int, rejected: int, start: int = 10) -> PairTokens:
    """A pair of made-up ids, all different."""
    ids = iter(range(start, start + prompt + chosen + rejected))
    return PairTokens(*(tuple(next(ids) for _ in range(count)) for count in (prompt, chosen, rejected)))


def with_settings(**settings: object) -> TrainerConfig:
    return msgspec.structs.replace(CONFIG, **settings)
