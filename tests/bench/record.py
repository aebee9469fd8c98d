"""How a bench speaks: one JSON object a line, kept in ``results/<bench>.json`` with the machine and the versions.

``python -m tests.bench.record`` writes the README's table of numbers from those files.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[2] / "README.md"
MARK = re.compile(r"(<!-- numbers -->\n).*?(<!-- /numbers -->)", re.S)
PACKAGES = ("ray", "torch", "transformers", "redis", "kafka-python", "deltalake", "trl", "peft")


def row(
    name: str, value: float, unit: str, *, bar: float, better: Literal["higher", "lower"], **detail: Any
) -> dict[str, Any]:
    """One measured figure beside its bar."""
    holds = value >= bar if better == "higher" else value <= bar
    return {
        "name": name,
        "value": round(value, 4),
        "unit": unit,
        "bar": bar,
        "better": better,
        "holds": holds,
        "commit": commit(),
        "baseline": detail.pop("baseline", None),
        "detail": detail,
    }


def save(bench: str, command: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows, one a line, and keep them with what they were measured on; of one name, the last."""
    document: dict[str, Any] = {
        "command": command,
        "machine": machine(),
        "versions": {package: found for package in PACKAGES if (found := _version(package))},
        "rows": list({line["name"]: line for line in rows}.values()),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{bench}.json").write_text(json.dumps(document, indent=2) + "\n")
    for line in document["rows"]:
        print(json.dumps(line))


def machine() -> dict[str, Any]:
    """What this is measured on."""
    return {
        "cores": os.cpu_count(),
        "cpu": _cpu(),
        "multiplies_bfloat16": "avx512_bf16" in Path("/proc/cpuinfo").read_text(),
        "python": platform.python_version(),
        "gpu": _gpu(),
    }


def quantile(values: list[float], q: float) -> float:
    """The smallest value that a share ``q`` of them do not exceed, roughly."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def rows(bench: str) -> list[dict[str, Any]]:
    """What was saved for ``bench``."""
    found: list[dict[str, Any]] = json.loads((RESULTS / f"{bench}.json").read_text())["rows"]
    return found


def table() -> str:
    """The README's table of every figure in ``results``."""
    lines = ["| what | measured | bar | holds | command |", "|---|---|---|---|---|"]
    for path in sorted(RESULTS.glob("*.json")):
        document = json.loads(path.read_text())
        for item in document["rows"]:
            sign = "≥" if item["better"] == "higher" else "≤"
            holds = "yes" if item["holds"] else "**no**"
            value = f"{_short(item['value'])} {item['unit']}".strip()
            bar = f"{sign} {_short(item['bar'])} {item['unit']}".strip()
            lines.append(f"| {item['name']} | {value} | {bar} | {holds} | `{document['command']}` |")
    return "\n".join(lines) + "\n"


def commit() -> str:
    """What was measured; a tree with changes in it, other than figures, says so."""
    name = _git("rev-parse", "--short", "HEAD")
    if not name:  # on a machine that was given files alone
        return os.environ.get("COMMIT", "unknown")
    changed = _git("status", "--porcelain", "--", ".", ":!tests/bench/results", ":!README.md")
    return f"{name}-dirty" if changed else name


def _git(*words: str) -> str:
    """What git says; nothing where there is none."""
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=False, cwd=README.parent)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu() -> str | None:
    """Name and memory of the first GPU; asked of PyTorch only by a bench that has it loaded."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _short(value: float) -> str:
    """Three digits that matter."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    README.write_text(MARK.sub(lambda match: match[1] + table() + match[2], README.read_text()))
