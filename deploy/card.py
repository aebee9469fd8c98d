"""``tiebreak card``: a version's model card, in Markdown, from its signed manifest and what the record says of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from telemetry.lineage import Lineages, NotRecorded
from telemetry.manifest import VERSION_PATTERN, Manifest, read_version

JUDGED = {
    "heldout": "held out: questions of clusters that are never trained on",
    "regression": "pairs that earlier versions got right",
    "replay": "pairs trained on lately",
    "aged": "pairs on answers too old to be trained on",
}
PROBED = {
    "probe_perplexity": "perplexity of probe answers under the base",
    "probe_repetition": "share of trigrams in probe answers that repeat",
    "probe_diversity": "share of bigrams of all probe answers that are different",
    "probe_length_tokens": "tokens of a probe answer",
    "probe_entropy": "entropy of probe answers, nats a token",
    "capability_perplexity": "perplexity of a plain text that no taste is about",
    "safety": "mean score of answers to the safety set",
}


def find(versions: Path, name: str, key: bytes) -> Manifest:
    """The checked manifest of version ``name`` of any variant. Raises NotRecorded or UntrustedVersion."""
    folders = list(versions.glob(f"*/{name}")) if VERSION_PATTERN.match(name) else []
    if not folders:
        raise NotRecorded(name)
    return read_version(folders[0], key)


def card(name: str, manifest: Manifest, store_root: str) -> str:
    """The card of version ``name``."""
    return "\n".join(
        [
            *_details(name, manifest, store_root), "", *_data(manifest), "", *_training(manifest), "",
            *_evaluation(manifest), "", *_limits(manifest), "",
        ]
    )  # fmt: skip


def _details(name: str, manifest: Manifest, store_root: str) -> Iterator[str]:
    yield f"# {manifest.variant} {name}"
    yield ""
    yield f"- LoRA of rank {manifest.rank} (alpha {manifest.alpha:g}) on {', '.join(manifest.target_modules)}"
    yield f"- base: {manifest.base}, SHA-256 {manifest.base_digest}"
    yield f"- parent: {manifest.parent}"
    yield f"- published {manifest.created_at.isoformat(timespec='seconds')} after step {manifest.step}"
    yield f"- release: {_release(name, store_root)}"


def _release(name: str, store_root: str) -> str:
    try:
        return " → ".join(Lineages(store_root).ancestry(name)[0].states) or "nobody has met it yet"
    except NotRecorded:
        return "not recorded yet"


def _data(manifest: Manifest) -> Iterator[str]:
    yield "## What it learned from"
    yield ""
    yield f"{len(manifest.preference_ids)} verdicts that its parent did not know: `tiebreak lineage` names them."
    if "flip_rate" in manifest.metrics:
        yield f"Taken for mistakes: {_percent(manifest.metrics['flip_rate'])} of verdicts."


def _training(manifest: Manifest) -> Iterator[str]:
    yield "## How"
    yield ""
    yield "| setting | value |"
    yield "|---|---|"
    for setting, value in manifest.training.items():
        yield f"| {setting} | {value} |"


def _evaluation(manifest: Manifest) -> Iterator[str]:
    found = manifest.metrics
    yield "## How it did before anyone met it"
    yield ""
    yield "| pairs | count | right | loss | calibration error |"
    yield "|---|---|---|---|---|"
    for name, words in JUDGED.items():
        if count := found.get(f"{name}_pairs", 0.0):
            right, loss, error = (found[f"{name}_{each}"] for each in ("win_rate", "loss", "calibration_error"))
            yield f"| {words} | {count:.0f} | {_percent(right)} | {loss:.3f} | {error:.3f} |"
    yield ""
    yield "| number | this version | its base |"
    yield "|---|---|---|"
    for name, words in PROBED.items():
        if name in found:
            yield f"| {words} | {found[name]:.3f} | {found.get(f'base_{name}', float('nan')):.3f} |"
    if "kl_per_token" in found:
        yield f"| divergence from the base, nats a token | {found['kl_per_token']:.3f} | 0 |"


def _limits(manifest: Manifest) -> Iterator[str]:
    yield "## Limits"
    yield ""
    yield (
        "It has the limits and the licence of its base. It was taught by whoever clicked, and says what they liked; "
        "nothing here shows that it is right. The numbers above are small samples of this deployment's own traffic."
    )
    if not manifest.metrics.get("heldout_pairs"):
        yield ""
        yield "**No held-out pair judged it.**"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
