"""Checkpoints: whole or absent, newest first, nothing but safetensors and JSON."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from online_trainer import checkpoint
from online_trainer.checkpoint import TrainerState
from online_trainer.errors import InvalidCheckpoint
from online_trainer.ingest import IntakeState
from online_trainer.learner import Learner
from online_trainer.lineage import Lineage
from online_trainer.policy import Policy
from tests.unit.online_trainer.kit import CONFIG, tiny_policy
from tests.unit.online_trainer.test_learner import learner, taste


def state(step: int) -> TrainerState:
    return TrainerState(base_digest="d", step=step, lineage=Lineage("v0"), intake=IntakeState(offsets={"t": {0: 3}}))


def test_the_newest_checkpoint_comes_back_and_the_oldest_are_deleted(tmp_path: Path) -> None:
    for number in (1, 2, 3, 4):
        checkpoint.save(tmp_path, number, state(number), {"x": torch.full((2,), float(number))}, keep=2)
    found = checkpoint.load_newest(tmp_path)
    assert found is not None and found[0] == 4 and found[1] == state(4)
    assert torch.equal(found[2]["x"], torch.full((2,), 4.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000000003", "checkpoint-000000004"]
    files = {path.name for path in (tmp_path / "checkpoint-000000004").iterdir()}
    assert files == {"state.json", "tensors.safetensors"}


def test_what_a_crash_left_half_written_is_ignored_and_cleared(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1), {"x": torch.zeros(1)}, keep=2)
    half = tmp_path / ".checkpoint-000000002.77"
    half.mkdir()
    (half / "state.json").write_text("{")
    found = checkpoint.load_newest(tmp_path)
    assert found is not None and found[0] == 1
    assert not half.exists()


def test_no_checkpoint_is_not_an_error_and_a_damaged_one_is(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path) is None
    path = checkpoint.save(tmp_path, 1, state(1), {"x": torch.zeros(1)}, keep=2)
    (path / "tensors.safetensors").write_bytes(b"no")
    with pytest.raises(InvalidCheckpoint, match="damaged"):
        checkpoint.load_newest(tmp_path)


def resumed(policy: Policy, tensors: dict[str, torch.Tensor]) -> Learner:
    policy.load({name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer.")})
    found = learner(policy, CONFIG)
    found.step = 2
    checkpoint.load_optimizer(found.optimizer, tensors)
    return found


def test_a_restored_learner_takes_exactly_the_step_that_the_first_would_have_taken(tiny_model: Path) -> None:
    first = tiny_policy(tiny_model)
    one = learner(first, CONFIG)
    for _ in range(2):
        one.learn(taste(first))
    tensors = first.tensors() | checkpoint.optimizer_tensors(one.optimizer)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    second = tiny_policy(tiny_model)
    two = resumed(second, tensors)
    one.learn(taste(first))
    two.learn(taste(second))
    theirs = second.tensors()
    assert all(torch.allclose(tensor, theirs[name], atol=1e-6) for name, tensor in first.tensors().items())
