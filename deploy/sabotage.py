"""A version that is whole, signed and bad: large random weights in the shape of one that was trained here.

For demonstrations and tests of the guards: it passes every check of form, so only its answers can give it away.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from safetensors.numpy import load_file, save_file

from telemetry.config import TelemetryConfig, open_log
from telemetry.events import TOPIC_OF, VersionPublished, encode, key_of, utc_now
from telemetry.manifest import ADAPTER_FILE, Manifest, file_digest, read_version, write_version
from telemetry.process import signing_key

NOISE = 1.0  # standard deviation of every weight; trained ones are about a hundredth of it
SEQUENCE_GAP = 900_000  # far from the trainer's own numbers


def publish_bad_version(telemetry: TelemetryConfig, variant: str, like: str, *, seed: int = 0) -> str:
    """Publish noise in the shape of version ``like``, as the trainer would publish; the new version's name."""
    state = telemetry.state_path
    key, store = signing_key(state), state / "versions"
    model = read_version(store / variant / like, key)
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / ADAPTER_FILE
        _write_noise(store / variant / like / ADAPTER_FILE, adapter, seed)
        manifest = replace(
            model,
            parent=like,
            sequence=SEQUENCE_GAP + model.sequence,
            created_at=utc_now(),
            files={ADAPTER_FILE: file_digest(adapter)},
            preference_ids=(),
            training={"objective": "none: random weights", "seed": seed},
            metrics={},
        )
        version, path = write_version(store, manifest, {ADAPTER_FILE: adapter}, key)
    _announce(telemetry, manifest, version, path)
    return version


def _write_noise(source: Path, target: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensors = load_file(source)
    noise = {name: (NOISE * rng.standard_normal(tensor.shape)).astype(tensor.dtype) for name, tensor in tensors.items()}
    save_file(noise, target)


def _announce(telemetry: TelemetryConfig, manifest: Manifest, version: str, path: Path) -> None:
    event = VersionPublished(
        variant=manifest.variant,
        version=version,
        parent=manifest.parent,
        base=manifest.base,
        digest=version.rpartition("-")[2],
        uri=str(path),
        step=manifest.step,
        preference_ids=(),
    )
    log = open_log(telemetry)
    try:
        log.append(TOPIC_OF[VersionPublished], key_of(event), encode(event)).result(10)
    finally:
        log.close()
