"""One tiny model for all of the trainer's unit tests; each test gets a fresh policy over it."""

from __future__ import annotations

from pathlib import Path

import pytest

from online_trainer.policy import Policy
from tests.unit.online_trainer.kit import tiny_folder, tiny_policy


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def policy(tiny_model: Path) -> Policy:
    return tiny_policy(tiny_model)
