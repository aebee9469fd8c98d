"""An adapter becomes a version: files, signed manifest, event.

The folder appears by one rename. Its event is told from the checkpoint that records it; if the trainer dies
between the two, ``unannounced`` finds the folder again and it is announced then, once.
"""

from __future__ import annotations

import hashlib
import tempfile
from datetime import datetime
from pathlib import Path

import msgspec
from safetensors.torch import load_file, save_file
from torch import Tensor

from online_trainer.config import TrainerConfig
from telemetry.events import VersionPublished
from telemetry.manifest import (
    ADAPTER_FILE,
    VERSION_PATTERN,
    Manifest,
    UntrustedVersion,
    file_digest,
    manifest_digest,
    read_version,
    write_version,
)

NAMED = frozenset({"variant", "base", "rank", "alpha", "targets"})  # a manifest's own fields say these


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be published, apart from the tensors."""

    parent: str
    base_digest: str
    step: int
    preference_ids: tuple[str, ...]
    metrics: dict[str, float]
    created_at: datetime


class VersionStore:
    """The versions of one variant on disk, signed with the deployment's key."""

    def __init__(self, root: Path, config: TrainerConfig, key: bytes, *, dataset: str = "") -> None:
        """``dataset``: the id of the data set that all its versions are made of; "" of those that learn online."""
        self._root, self._config, self._key, self.dataset = root, config, key, dataset

    @property
    def _folder(self) -> Path:
        return self._root / self._config.variant

    def folder(self, version: str) -> Path:
        """Where a version lies."""
        return self._folder / version

    def next_sequence(self) -> int:
        """One more than any version in the store has, whoever put it there."""
        found = (VERSION_PATTERN.match(path.name) for path in self._folder.glob("v*"))
        return 1 + max((int(match[1]) for match in found if match), default=0)

    def write(self, draft: Draft, tensors: dict[str, Tensor]) -> tuple[str, Manifest]:
        """Put a version into the store; its name and manifest."""
        config = self._config
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / ADAPTER_FILE
            save_file(tensors, path)
            manifest = Manifest(
                variant=config.variant, sequence=self.next_sequence(), parent=draft.parent, base=config.base,
                base_digest=draft.base_digest, created_at=draft.created_at, step=draft.step,
                rank=config.rank, alpha=config.alpha, target_modules=config.targets,
                files={ADAPTER_FILE: file_digest(path)}, preference_ids=draft.preference_ids,
                training=_training(config) | ({"dataset": self.dataset} if self.dataset else {}),
                metrics=draft.metrics,
            )  # fmt: skip
            version, _ = write_version(self._root, manifest, {ADAPTER_FILE: path}, self._key)
        return version, manifest

    def read(self, version: str) -> dict[str, Tensor]:
        """A version's adapter, checked; raises FileNotFoundError or UntrustedVersion."""
        folder = self.folder(version)
        read_version(folder, self._key)
        return load_file(folder / ADAPTER_FILE)

    def unannounced(self, parent: str, step: int, preference_ids: tuple[str, ...]) -> tuple[str, Manifest] | None:
        """The version made of exactly these weights, if the store has it: its event may never have been told."""
        for folder in sorted(self._folder.glob("v*"), reverse=True):
            try:
                manifest = read_version(folder, self._key)
            except (UntrustedVersion, FileNotFoundError):
                continue  # somebody else's affair: serving refuses it as well
            if (manifest.parent, manifest.step, manifest.preference_ids) == (parent, step, preference_ids):
                return folder.name, manifest
        return None

    def announcement(self, version: str, manifest: Manifest, oldest_verdict_at: datetime | None) -> VersionPublished:
        """The version's event: the same one, with the same id, however often it is made."""
        return VersionPublished(
            event_id=derived_id(f"published/{manifest.variant}/{version}"),
            occurred_at=manifest.created_at,
            variant=manifest.variant,
            version=version,
            parent=manifest.parent,
            base=manifest.base,
            digest=manifest_digest(manifest),
            uri=str(self.folder(version)),
            step=manifest.step,
            preference_ids=manifest.preference_ids,
            oldest_verdict_at=oldest_verdict_at,
            metrics=manifest.metrics,
            dataset=self.dataset,
        )


def derived_id(name: str) -> str:
    """A UUIDv8 (RFC 9562 §5.8) made of ``name`` alone, so that a repeated event is recognised."""
    bits = int.from_bytes(hashlib.sha256(f"tiebreak/{name}".encode()).digest()[:16], "big")
    bits = (bits & ~(0xF << 76)) | (0x8 << 76)
    bits = (bits & ~(0x3 << 62)) | (0x2 << 62)
    text = f"{bits:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def _training(config: TrainerConfig) -> dict[str, float | int | str]:
    """All settings that the version depends on but for those that have a field of their own; lists as JSON."""
    named = (name for name in config.learning if name not in NAMED)
    return {name: _plain(config.learning[name]) for name in named}


def _plain(value: object) -> float | int | str:
    if isinstance(value, str | float) or type(value) is int:
        return value
    return msgspec.json.encode(value).decode()
