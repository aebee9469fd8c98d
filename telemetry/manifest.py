"""A version on disk: ``versions/<variant>/<version>/{adapter.safetensors, manifest.json}``, whole or absent.

The folder appears by one rename, so that what can be seen is complete. A version's name ends in the
first 8 hex digits of its manifest digest; the manifest carries the SHA-256 of every file and an HMAC
signature. Nothing is mapped before digest and signature have been checked. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import shutil
from datetime import datetime
from pathlib import Path

import msgspec

from telemetry.crashpoints import reach
from telemetry.process import sync

ADAPTER_FILE = "adapter.safetensors"
MANIFEST_FILE = "manifest.json"
VERSION_PATTERN = re.compile(r"^v([0-9]{6})-([0-9a-f]{8})$")


class UntrustedVersion(ValueError):
    """The version's files do not match their manifest, or its signature is not ours: do not load it."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a version is, where it came from, and how it did before it met anyone."""

    variant: str
    sequence: int
    parent: str
    base: str  # base model name in the configuration
    base_digest: str  # SHA-256 over the base model's safetensors
    created_at: datetime
    step: int
    rank: int
    alpha: float
    target_modules: tuple[str, ...]  # suffixes of module names, e.g. q_proj
    files: dict[str, str]  # file name → SHA-256
    preference_ids: tuple[str, ...] = ()
    training: dict[str, float | int | str] = {}  # beta, learning rate, objective, …
    metrics: dict[str, float] = {}
    decoding: dict[str, float] = {}


def manifest_digest(manifest: Manifest) -> str:
    """SHA-256 (hex) over the manifest's canonical JSON."""
    return hashlib.sha256(msgspec.json.encode(manifest, order="sorted")).hexdigest()


def version_name(sequence: int, digest: str) -> str:
    """``v000042-1a2b3c4d``"""
    return f"v{sequence:06d}-{digest[:8]}"


def base_version(base_digest: str) -> str:
    """The base itself: sequence 0, named by the digest of its weights."""
    return version_name(0, base_digest)


def is_base(version: str) -> bool:
    """Whether ``version`` is a base itself."""
    return version.startswith(base_version(""))


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sign(digest: str, key: bytes) -> str:
    """HMAC-SHA-256 (hex) of a manifest digest."""
    return hmac.new(key, b"tiebreak-manifest:" + digest.encode(), hashlib.sha256).hexdigest()


def write_version(store: Path, manifest: Manifest, files: dict[str, Path], key: bytes) -> tuple[str, Path]:
    """Put ``files`` and their signed manifest into ``store/<variant>/<version>`` atomically; (name, folder)."""
    digest = manifest_digest(manifest)
    version = version_name(manifest.sequence, digest)
    folder = store / manifest.variant / version
    staging = folder.with_name(f".{version}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for name, source in files.items():
        shutil.copyfile(source, staging / name)
    document = {"manifest": manifest, "digest": digest, "signature": sign(digest, key)}
    (staging / MANIFEST_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(document)))
    for path in staging.iterdir():
        sync(path)
    reach("publisher.staged")
    staging.rename(folder)
    sync(folder.parent)
    return version, folder


def read_version(folder: Path, key: bytes) -> Manifest:
    """The manifest of the version in ``folder``, after every digest and the signature were checked.

    Raises UntrustedVersion when anything does not match, FileNotFoundError when the folder is absent.
    """
    document = msgspec.json.decode((folder / MANIFEST_FILE).read_bytes())
    manifest = msgspec.convert(document["manifest"], Manifest)
    digest = manifest_digest(manifest)
    if digest != document["digest"] or folder.name != version_name(manifest.sequence, digest):
        raise UntrustedVersion(f"{folder}: the manifest does not match its digest or its folder's name")
    if not hmac.compare_digest(sign(digest, key), document["signature"]):
        raise UntrustedVersion(f"{folder}: the signature was not made with this deployment's key")
    for name, expected in manifest.files.items():
        if file_digest(folder / name) != expected:
            raise UntrustedVersion(f"{folder / name}: the file does not match the manifest")
    return manifest


def base_digest(folder: Path) -> str:
    """SHA-256 (hex) over the base model's safetensors files in ``folder``, in name order."""
    digest = hashlib.sha256()
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no *.safetensors; a base model is a transformers folder")
    for path in paths:
        digest.update(file_digest(path).encode())
    return digest.hexdigest()
