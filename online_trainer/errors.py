"""What can stop a trainer.

TrainerError
├── InvalidCheckpoint
└── IncompatibleAdapter
"""

from __future__ import annotations


class TrainerError(RuntimeError):
    """The trainer cannot go on; the message says what to mend."""


class InvalidCheckpoint(TrainerError):
    """The checkpoint does not belong to this configuration or base model, or is damaged."""


class IncompatibleAdapter(TrainerError):
    """The adapter's tensors do not fit this trainer's policy: other rank, layers or targets."""
