"""What can stop a trainer.

TrainerError
├── InvalidCheckpoint
├── IncompatibleAdapter
├── HelperLost
├── TrainerInUse
├── TrackerMissing
└── UnusableExamples
"""

from __future__ import annotations

from collections.abc import Collection


class TrainerError(RuntimeError):
    """The trainer cannot go on; the message says what to mend."""


class InvalidCheckpoint(TrainerError):
    """The checkpoint does not belong to this configuration or base model, or is damaged."""


class IncompatibleAdapter(TrainerError):
    """The adapter's tensors do not fit this trainer's policy: other rank, layers or targets."""


class HelperLost(TrainerError):
    """A process that computes steps with the trainer ended or hangs; a new start takes the step again."""


class TrainerInUse(TrainerError):
    """Another trainer learns on this folder: two would take, and tell, every step twice."""


class TrackerMissing(TrainerError):
    """Runs are to be tracked by something that is not installed."""

    def __init__(self, tracking: str, packages: Collection[str]) -> None:
        wanted = ", ".join(packages)
        super().__init__(
            f'[trainer] tracking = "{tracking}" needs {wanted}: install them with the extra "tracking" '
            '(uv pip install -e ".[tracking]"), or leave it ""'
        )


class UnusableExamples(TrainerError):
    """No step can be taken on these examples; on the others one can."""

    def __init__(self, preference_ids: Collection[str], why: str) -> None:
        super().__init__(f"no step can be taken on {', '.join(sorted(preference_ids))}: {why}")
        self.preference_ids = frozenset(preference_ids)
