"""The tiny model, made once a session: in float32, and with weights that half precision holds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from deploy.models import make_tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-7"
    make_tiny(7, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_halves(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a checkpoint in bfloat16 has them: the engine packs these."""
    folder = tmp_path_factory.mktemp("models") / "tiny-7-halves"
    shutil.copytree(tiny_model, folder)
    weights = folder / "model.safetensors"
    rounded = {name: tensor.bfloat16().float() for name, tensor in load_file(weights).items()}
    save_file(rounded, weights, metadata={"format": "pt"})
    return folder
