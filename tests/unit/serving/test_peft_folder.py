"""A published version in PEFT's layout: what PEFT makes of it, and what is refused before any server sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from serving.errors import VersionRefused
from serving.peft_folder import base_shapes, write_nothing, write_peft
from telemetry.manifest import ADAPTER_FILE, file_digest, read_version, write_version
from tests.unit.serving.kit import KEY, Reference, adapter_tensors, publish


def converted(model: Path, state: Path, version: Path) -> Path:
    folder = state / "converted" / version.name
    write_peft(version, read_version(version, KEY), folder, model=model, shapes=base_shapes(model))
    return folder


def published_with(model: Path, state: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A signed version that holds ``tensors`` instead of its own."""
    manifest = read_version(publish(state, model, 1)[1], KEY)
    source = state / "other.safetensors"
    save_file(tensors, source)
    changed = msgspec.structs.replace(manifest, files={ADAPTER_FILE: file_digest(source)})
    return write_version(state / "changed", changed, {ADAPTER_FILE: source}, KEY)[1]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_computes_with_it_what_the_merged_weights_do(tiny_model: Path, tmp_path: Path) -> None:
    _, version = publish(tmp_path, tiny_model, 1)
    reference = Reference(tiny_model, seed=1)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, converted(tiny_model, tmp_path, version))
    ids = reference.prompt_ids("Hello there")
    with torch.no_grad():
        logprobs = adapted(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    torch.testing.assert_close(logprobs, reference.logprobs(ids), atol=1e-4, rtol=1e-4)


def test_it_is_written_over_what_was_there(tiny_model: Path, tmp_path: Path) -> None:
    _, version = publish(tmp_path, tiny_model, 1)
    folder = converted(tiny_model, tmp_path, version)
    (folder / "adapter_config.json").write_text("{}")
    assert converted(tiny_model, tmp_path, version) == folder
    assert "lora_alpha" in (folder / "adapter_config.json").read_text()
    assert [path.name for path in folder.parent.iterdir()] == [version.name]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t | {n: v * torch.nan for n, v in t.items() if n.endswith("A.weight")}, "not finite"),
        (lambda t: {n: v for n, v in t.items() if not n.endswith("B.weight")}, "no place"),
        (lambda t: {n.replace("layers.0", "layers.9"): v for n, v in t.items()}, "no place"),
        (lambda t: {n: v[:2].contiguous() for n, v in t.items()}, "expected"),
        (lambda t: {}, "no tensors"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(tiny_model: Path, tmp_path: Path, spoil: Any, message: str) -> None:
    version = published_with(tiny_model, tmp_path, spoil(adapter_tensors(tiny_model, 1, 4)))
    with pytest.raises(VersionRefused, match=message):
        converted(tiny_model, tmp_path, version)
    assert not (tmp_path / "converted" / version.name).exists()


def test_an_adapter_that_changes_nothing_is_all_zeros_on_one_module(tiny_model: Path, tmp_path: Path) -> None:
    write_nothing(tmp_path / "base", model=tiny_model, shapes=base_shapes(tiny_model))
    tensors = load_file(tmp_path / "base" / "adapter_model.safetensors")
    assert sorted(tuple(tensor.shape) for tensor in tensors.values()) == [(1, 64), (64, 1)]
    assert not any(bool(tensor.any()) for tensor in tensors.values())
