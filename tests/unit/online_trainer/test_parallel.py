"""A step is the same whoever computes it, and who helps leaves with the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from online_trainer.errors import HelperLost
from online_trainer.learner import NOBODY, Example, Helpers, Learner, Lesson
from online_trainer.parallel import Crew, shared_out, start
from online_trainer.policy import Encoded, Policy
from tests.unit.online_trainer.kit import CONFIG, tiny_folder, tiny_policy, tokens
from tests.unit.online_trainer.test_policy import scramble

PAIRS = [tokens(3, 6, 6), tokens(4, 9, 5), tokens(2, 5, 8), tokens(3, 7, 7), tokens(5, 8, 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def crew(folder: Path) -> Iterator[Helpers]:
    with closing(start(replace(CONFIG, model=str(folder), processes=2))) as found:
        yield found


def step(folder: Path, helpers: Helpers, *, anchored: bool = False) -> tuple[Policy, Lesson]:
    """One step on PAIRS and a thumb, from the same weights each time."""
    policy = tiny_policy(folder)
    scramble(policy, 0.1)
    if anchored:
        policy.anchor_at(policy.tensors())
        scramble(policy, 0.2)
    encoded = policy.encode(PAIRS)
    examples = [Example(f"p{n}", pair, weight=1.0 + n) for n, pair in enumerate(encoded)]
    examples.append(Example("thumb", policy.encode([tokens(3, 6, 0)])[0], thumb=1))
    config = replace(CONFIG, micro_batch_tokens=40, kl_budget=0.0)
    return policy, Learner(policy, config, lambda: 0.02, helpers).learn(examples)


def test_two_processes_take_the_step_that_one_takes_the_same_one_each_time(folder: Path, crew: Helpers) -> None:
    for anchored in (False, True):
        one, lesson = step(folder, NOBODY, anchored=anchored)
        two, together = step(folder, crew, anchored=anchored)
        again, _ = step(folder, crew, anchored=anchored)
        for name, tensor in one.tensors().items():
            torch.testing.assert_close(two.tensors()[name], tensor, rtol=1e-4, atol=1e-6)
            assert torch.equal(two.tensors()[name], again.tensors()[name])
        assert together.metrics == pytest.approx(lesson.metrics, rel=1e-4)
        assert together.agreement == pytest.approx(lesson.agreement, rel=1e-4)
        assert set(together.agreement) == {f"p{n}" for n in range(len(PAIRS))}


def sized(total: int) -> Example:
    pair = tokens(1, total - 1, 0)
    return Example(str(total), Encoded(pair, torch.empty(0), 0.0, 0.0))


def test_parts_go_to_whoever_has_least() -> None:
    shares = shared_out([[sized(total)] for total in (9, 2, 3, 5)], 2)
    assert [[part[0].preference_id for part in share] for share in shares] == [["9"], ["5", "3", "2"]]


def test_a_helper_that_is_gone_stops_the_step_with_a_word(folder: Path, crew: Helpers) -> None:
    assert isinstance(crew, Crew)
    crew.people[0].kill()
    crew.people[0].join()
    with pytest.raises(HelperLost, match="gone"):
        step(folder, crew)
