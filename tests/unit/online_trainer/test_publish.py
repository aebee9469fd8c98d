"""What a version's manifest says of how it was made."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch

from online_trainer.config import PLACES, TrainerConfig
from online_trainer.publish import NAMED, Draft, VersionStore
from telemetry.manifest import read_version
from tests.unit.online_trainer.kit import START, with_settings

KEY = b"k" * 32
DRAFT = Draft(parent="v0", base_digest="d", step=1, preference_ids=(), metrics={}, created_at=START)


def test_a_manifest_names_every_setting_that_the_version_depends_on(tmp_path: Path) -> None:
    config = with_settings(reference="ema", balances_cohorts=True, safety_probes=("Hello?",), tracking_uri="secret")
    store = VersionStore(tmp_path, config, KEY, dataset="ds-1")
    version, _ = store.write(DRAFT, {"x": torch.zeros(1)})
    training = read_version(store.folder(version), KEY).training  # as it comes back from disk
    fields = {field.name for field in msgspec.structs.fields(TrainerConfig)}
    assert training.keys() == fields - PLACES - NAMED | {"dataset"}
    assert (training["reference"], training["balances_cohorts"], training["beta"]) == ("ema", "true", 0.1)
    assert (training["safety_probes"], training["processes"]) == ('["Hello?"]', 1)
