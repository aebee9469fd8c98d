"""Programs on Node.js with the official OpenAI SDK, installed once from the lock in ``tests/contract/javascript``."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tests" / "contract" / "javascript"
INSTALLED = ("package.json", "package-lock.json", ".npmrc")
INSTALL = ("ci", "--ignore-scripts", "--no-audit", "--no-fund")


class NodeNotInstallable(RuntimeError):
    """Node.js or the SDK cannot be had on this machine; the message says what to install."""


def sdk_folder() -> Path:
    """The folder whose ``node_modules`` are what the lock says, filled on first use. Raises NodeNotInstallable."""
    _program("node", "nodejs")
    digest = hashlib.sha256(b"".join((SOURCE / name).read_bytes() for name in INSTALLED)).hexdigest()
    folder = ROOT / ".cache" / f"javascript-{digest[:12]}"
    if not folder.exists():
        _install(folder)
    return folder


def run_program(name: str, *arguments: str) -> Any:
    """What the program ``name`` of ``tests/contract/javascript`` prints, as JSON."""
    command = ["node", "--input-type=module", "-", *arguments]
    # A program that is read from the standard input finds its packages in the working directory.
    with (SOURCE / name).open() as program:
        done = subprocess.run(
            command, stdin=program, cwd=sdk_folder(), capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _install(folder: Path) -> None:
    npm = _program("npm", "npm")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".javascript-", dir=folder.parent))
    for name in INSTALLED:
        shutil.copy(SOURCE / name, staging)
    done = subprocess.run([npm, *INSTALL], cwd=staging, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(staging)
        raise NodeNotInstallable(f"npm could not install the OpenAI SDK: {(done.stdout + done.stderr)[-2000:]}")
    try:
        staging.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(staging)


def _program(name: str, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise NodeNotInstallable(f"{name} is not on this machine; on Debian: apt-get install {package}")
    return path
