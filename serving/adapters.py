"""A verified version's folder into an adapter slot: safetensors only, mapped after its digests were checked."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from serving.errors import VersionRefused
from serving.lora import LoraStack, ShapeMismatch
from telemetry.manifest import ADAPTER_FILE, Manifest


def load_adapter(stack: LoraStack, slot: int, folder: Path, manifest: Manifest) -> None:
    """Read the adapter in ``folder`` and write it into ``slot``; raises VersionRefused, the slot then empty."""
    try:
        tensors = load_file(folder / ADAPTER_FILE)
        if not tensors:
            raise ShapeMismatch("there are no weights in it")
        # one copy and one question: asked of each tensor it takes five times as long, beside a running step
        if not torch.cat([tensor.reshape(-1) for tensor in tensors.values()]).isfinite().all():
            raise ShapeMismatch("some weights are not finite numbers")
        stack.write(slot, tensors, rank=manifest.rank, scaling=manifest.alpha / manifest.rank)
    except (OSError, SafetensorError, ShapeMismatch) as error:
        stack.clear(slot)
        raise VersionRefused(f"{folder.name}: {error}") from error
