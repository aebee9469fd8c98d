"""A published version as a folder in PEFT's layout, which other servers load: ``adapter_config.json`` beside
``adapter_model.safetensors``, its tensors named ``base_model.model.<module>.lora_{A,B}.weight``.

The shapes are held against the base model's own files first, for not every server checks them before it maps them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from serving.errors import UnsupportedModel, VersionRefused
from telemetry.manifest import ADAPTER_FILE, Manifest

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
Shapes = Mapping[str, tuple[int, ...]]


def base_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape of every tensor in the safetensors files of ``model``; the weights stay on disk."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def write_peft(version: Path, manifest: Manifest, folder: Path, *, model: Path, shapes: Shapes) -> None:
    """Write the verified ``version`` over ``model`` as ``folder``, whole by one rename; raises VersionRefused."""
    try:
        tensors = load_file(version / ADAPTER_FILE)
    except (OSError, SafetensorError) as error:
        raise VersionRefused(f"{version.name}: {error}") from error
    if reason := _misfit(tensors, manifest.rank, shapes):
        raise VersionRefused(f"{version.name}: {reason}")
    _write(tensors, _config(model, manifest.rank, manifest.alpha, manifest.target_modules), folder)


def write_nothing(folder: Path, *, model: Path, shapes: Shapes) -> None:
    """Write an adapter that changes nothing: the base itself under a name of its own."""
    weight = next((name for name in shapes if name.endswith(("q_proj.weight", "qkv_proj.weight"))), "")
    if not weight:
        raise UnsupportedModel(f"{model}: no q_proj or qkv_proj to put an empty adapter on")
    module, (outputs, inputs) = weight.removesuffix(".weight"), shapes[weight]
    tensors = {f"{module}.lora_A.weight": torch.zeros(1, inputs), f"{module}.lora_B.weight": torch.zeros(outputs, 1)}
    _write(tensors, _config(model, 1, 1.0, (module.rsplit(".", 1)[-1],)), folder)


def _write(tensors: Mapping[str, Tensor], config: Mapping[str, object], folder: Path) -> None:
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    save_file({PREFIX + name: tensor for name, tensor in tensors.items()}, staging / WEIGHTS_FILE)
    (staging / CONFIG_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(config)))
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


def _config(model: Path, rank: int, alpha: float, modules: Sequence[str]) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def _misfit(tensors: Mapping[str, Tensor], rank: int, shapes: Shapes) -> str:
    """Why these tensors are no adapter of ``rank`` over the base, "" when they are."""
    if not tensors:
        return "the adapter holds no tensors"
    for name, tensor in tensors.items():
        module, _, side = name.rpartition(".lora_")
        other = f"{module}.lora_{'B' if side == 'A.weight' else 'A'}.weight"
        base = shapes.get(f"{module}.weight", ())
        if side not in ("A.weight", "B.weight") or other not in tensors or len(base) != 2:
            return f"{name} has no place in the base model"
        wanted = (rank, base[1]) if side == "A.weight" else (base[0], rank)
        if tuple(tensor.shape) != wanted:
            return f"{name}: {tuple(tensor.shape)}; expected {wanted}"
        if not bool(torch.isfinite(tensor).all()):
            return "some weights are not finite numbers"
    return ""
