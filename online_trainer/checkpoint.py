"""Checkpoints: weights, optimizer, offsets, waiting and untold events, in one folder that is whole or absent.

Safetensors and JSON only. Staged, synced, then renamed, so that a crash at any instruction leaves the previous
one. What a checkpoint says has been done is what its weights have learned: neither more nor less.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from online_trainer.annotators import Record
from online_trainer.errors import InvalidCheckpoint
from online_trainer.ingest import IntakeState
from online_trainer.lineage import Lineage
from telemetry.crashpoints import reach
from telemetry.process import sync

STATE_FILE = "state.json"
TENSORS_FILE = "tensors.safetensors"
_FOLDER = re.compile(r"^checkpoint-(\d{9})$")


class TrainerState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything but tensors."""

    base_digest: str
    step: int = 0
    lineage: Lineage
    intake: IntakeState = IntakeState()
    annotators: tuple[Record, ...] = ()
    flips: float | None = None  # the estimated share of flipped verdicts
    untold: tuple[str, ...] = ()  # encoded events that the log may not have yet; telling twice does no harm


def save(folder: Path, number: int, state: TrainerState, tensors: dict[str, Tensor], keep: int) -> Path:
    """Write checkpoint ``number`` durably and delete all but the newest ``keep``."""
    target = folder / f"checkpoint-{number:09d}"
    staging = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    save_file(tensors, staging / TENSORS_FILE)
    (staging / STATE_FILE).write_bytes(msgspec.json.encode(state))
    for path in (staging / TENSORS_FILE, staging / STATE_FILE, staging):
        sync(path)
    reach("trainer.checkpoint_staged")
    staging.rename(target)
    sync(folder)
    for _, old in _numbered(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def load_newest(folder: Path) -> tuple[int, TrainerState, dict[str, Tensor]] | None:
    """(number, state, tensors) of the newest checkpoint; None where there is none; raises InvalidCheckpoint."""
    for leftover in folder.glob(".checkpoint-*"):
        shutil.rmtree(leftover)
    numbered = _numbered(folder)
    if not numbered:
        return None
    number, path = numbered[-1]
    try:
        state = msgspec.json.decode((path / STATE_FILE).read_bytes(), type=TrainerState)
        return number, state, load_file(path / TENSORS_FILE)
    except (OSError, msgspec.MsgspecError, SafetensorError) as error:
        raise InvalidCheckpoint(f"{path} is damaged ({error}); move it away to go on from the one before") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: ``optimizer.<parameter's number>.<name>``."""
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"optimizer.{number}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for number, values in state.items()
        for name, value in values.items()
    }


def anchor_tensors(anchor: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The reference's adapter, if it has one of its own, as named tensors: ``anchor.<name>``."""
    return {f"anchor.{name}": tensor for name, tensor in (anchor or {}).items()}


def load_anchor(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """What ``anchor_tensors`` was given."""
    found = {n.removeprefix("anchor."): tensor for n, tensor in tensors.items() if n.startswith("anchor.")}
    return found or None


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what ``optimizer_tensors`` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        prefix, _, rest = key.partition(".")
        if prefix == "optimizer":
            number, _, name = rest.partition(".")
            state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Whole checkpoints, oldest first."""
    found = ((match, path) for path in folder.glob("checkpoint-*") if (match := _FOLDER.match(path.name)))
    return sorted((int(match[1]), path) for match, path in found)
