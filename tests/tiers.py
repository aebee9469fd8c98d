"""``make test``: the tiers in order, unit, contract, integration, e2e, each with what it needs of the machine.

Missing programs are installed from Debian's packages where we are root; elsewhere the tests that need them are
skipped and it is said which and why. With ``CI=true`` something missing is a failure, and no test is run without it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Two files at a time where tests mostly wait for servers; a whole stack (e2e) needs the machine to itself.
PARALLEL = ("-n", "2", "--dist", "loadfile")
TIERS: dict[str, tuple[str, ...]] = {"unit": PARALLEL, "contract": PARALLEL, "integration": PARALLEL, "e2e": ()}


@dataclass(frozen=True)
class Need:
    """A program, the Debian packages that bring it, and what is not tested without it."""

    program: str
    packages: tuple[str, ...]
    tests: str


NEEDS = (
    Need("redis-server", ("redis-server",), "the system's Redis (the packaged one is used instead)"),
    Need("java", ("default-jre-headless",), "contract, integration and e2e on a real Kafka broker"),
    Need("mvn", ("maven",), "contract, integration and e2e on a real Kafka broker (Maven fetches it)"),
    Need("prometheus", ("prometheus",), "integration: the dashboard's queries on a real Prometheus"),
    Need("promtool", ("prometheus",), "unit and integration: recording and alert rules"),
    Need("node", ("nodejs",), "contract: the official OpenAI SDK for JavaScript"),
    Need("npm", ("npm",), "contract: the official OpenAI SDK for JavaScript (npm fetches it)"),
    Need("chromium", ("chromium", "chromium-driver"), "e2e: the page in a real browser"),
)


def missing(needs: Sequence[Need] = NEEDS) -> list[Need]:
    return [need for need in needs if shutil.which(need.program) is None]


def install(needs: Sequence[Need]) -> str:
    """Install what is missing from Debian; "" when done, else why not."""
    if shutil.which("apt-get") is None:
        return "there is no apt-get here"
    if os.geteuid() != 0:
        return "only root may install packages"
    packages = sorted({package for need in needs for package in need.packages})
    print(f"installing {' '.join(packages)} …", flush=True)
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-qq", "-y", "--no-install-recommends"]):
        words = command + (packages if "install" in command else [])
        done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"`{' '.join(words)}` failed: {done.stderr.strip()[-500:]}"
    return ""


def run_tier(tier: str, arguments: Sequence[str]) -> tuple[int, float]:
    """(pytest's exit status, seconds)"""
    folder = ROOT / "tests" / tier
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", str(folder), *TIERS[tier], *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environ, check=False)
    return done.returncode, time.monotonic() - start


def report(results: Mapping[str, tuple[int, float]], lacking: Sequence[Need], why: str) -> None:
    for tier, (status, seconds) in results.items():
        print(f"{tier:<12} {'passed' if status == 0 else 'FAILED'} in {seconds:.0f} s")
    for need in lacking:
        print(f"not tested   {need.tests}: {need.program} is missing and {why}")


def main(arguments: Sequence[str]) -> int:
    """Run every tier, the later ones also after a failure; 0 when all passed."""
    why, lacking = "", missing()
    if lacking:
        why = install(lacking)
        lacking = missing()
    if lacking and os.environ.get("CI") == "true":
        report({}, lacking, why or "its package did not bring it")
        return 1
    results = {tier: run_tier(tier, arguments) for tier in TIERS}
    report(results, lacking, why or "its package did not bring it")
    return 1 if any(status != 0 for status, _ in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
