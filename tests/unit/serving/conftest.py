"""The tiny model, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.models import make_tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-7"
    make_tiny(7, folder)
    return folder
