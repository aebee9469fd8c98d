"""``tiebreak doctor``: is this machine fit for a stack, and if not, what mends it. Looks only, changes nothing."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from deploy import machine
from deploy.config import Deployment, load, model_cache
from deploy.launch import require_broker
from deploy.status import read_status
from router.admission import is_loopback
from telemetry.configuration import InvalidConfiguration

PACKAGES = ("ray", "torch", "transformers", "redis", "kafka-python", "deltalake", "msgspec")
Verdict = Literal["ok", "warn", "fail"]


class Finding(msgspec.Struct, frozen=True):
    """One thing looked at. ``warn`` costs a feature or speed, ``fail`` keeps the stack from starting."""

    name: str
    verdict: Verdict
    detail: str
    mend: str = ""


def examine(config: Path, *, state: str = "", port: int | None = None) -> Iterator[Finding]:
    """Every finding, in the order in which people mend them."""
    yield _python()
    yield from _packages()
    yield _cores()
    try:
        deployment = load(config, state=state, port=port)
    except InvalidConfiguration as error:
        yield Finding("configuration", "fail", str(error), "correct the file, or start from deploy/local.toml")
        return
    yield Finding("configuration", "ok", f"{config}, state in {deployment.state}")
    yield _memory(deployment)
    yield _disk(deployment)
    yield from _address(deployment)
    yield _redis(deployment)
    yield _log(deployment)
    yield from _models(deployment)
    yield from _test_programs()


def _python() -> Finding:
    version = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        return Finding("python", "ok", version)
    return Finding("python", "fail", version, "use Python 3.11 or 3.12: delete .venv and run `make setup` with uv")


def _packages() -> Iterator[Finding]:
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        yield Finding("packages", "fail", f"missing: {', '.join(missing)}", "run `make setup`")
    else:
        yield Finding("packages", "ok", ", ".join(found))


def _cores() -> Finding:
    count = machine.cores()
    if count >= 2:
        return Finding("cores", "ok", str(count))
    return Finding("cores", "warn", str(count), "training and answering share one core: expect minutes, not seconds")


def _memory(deployment: Deployment) -> Finding:
    free, needed = machine.available_memory_bytes() / machine.GB, deployment.stack.min_free_memory_gb
    detail = f"{free:.1f} GB free, {needed:g} needed"
    return Finding("memory", "ok", detail) if free >= needed else Finding("memory", "fail", detail, "close something")


def _disk(deployment: Deployment) -> Finding:
    free, needed = machine.free_disk_bytes(deployment.state) / machine.GB, deployment.stack.min_free_disk_gb
    detail = f"{free:.1f} GB free, {needed:g} needed"
    if free >= needed:
        return Finding("disk", "ok", detail)
    return Finding("disk", "fail", detail, "free some, or put the state elsewhere with TIEBREAK_STATE")


def _address(deployment: Deployment) -> Iterator[Finding]:
    stack = deployment.stack
    status = read_status(deployment.state)
    if status is not None and status.state in ("starting", "ready", "degraded"):
        yield Finding("port", "ok", f"{status.url} is this deployment, {status.state} (pid {status.pid})")
    elif machine.is_port_free(stack.host, stack.port):
        yield Finding("port", "ok", f"{stack.host}:{stack.port} is free")
    else:
        yield Finding(
            "port", "fail", f"{stack.host}:{stack.port} is in use", f"stop its user, or TIEBREAK_PORT={stack.port + 1}"
        )
    if not deployment.has_keys and not is_loopback(stack.host):
        yield Finding("access", "fail", f"open to all on {stack.host}", "set [router] key_file, or a loopback host")
    else:
        yield Finding("access", "ok", "keys are asked for" if deployment.has_keys else "open, on loopback only")


def _redis(deployment: Deployment) -> Finding:
    if not deployment.owns_redis:
        return Finding("redis", "ok", f"configured: {deployment.telemetry.redis_url}")
    program = machine.redis_program()
    if program:
        return Finding("redis", "ok", program)
    return Finding("redis", "fail", "no redis-server", "install Debian's redis-server, or run `make setup`")


def _log(deployment: Deployment) -> Finding:
    where = deployment.telemetry.kafka_bootstrap
    if deployment.telemetry.log == "redis":
        return Finding("log", "ok", "in Redis")
    try:
        require_broker(deployment)
    except OSError as error:
        mend = "start the broker; one to try with: python -m deploy.kafka.broker --state DIR"
        return Finding("log", "fail", str(error), mend)
    return Finding("log", "ok", f"Kafka at {where}")


def _models(deployment: Deployment) -> Iterator[Finding]:
    for name, table in deployment.document.get("serving", {}).get("bases", {}).items():
        spec = str(table.get("model", ""))
        kind, _, package = spec.partition(":")
        if kind == "package":
            try:
                version = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                yield Finding(f"model {name}", "fail", f"package {package} is missing", "run `make setup`")
                continue
            is_there = (model_cache()).is_dir() and any(model_cache().glob(f"{package}-{version}-*"))
            detail = "converted" if is_there else "is converted at the first start (20 s)"
            yield Finding(f"model {name}", "ok", f"{package} {version}, {detail}")
        elif kind == "tiny" or Path(spec).expanduser().is_dir():
            yield Finding(f"model {name}", "ok", spec)
        else:
            yield Finding(
                f"model {name}", "warn", f"{spec} is no folder here", "the hub must be reachable, or give a folder"
            )


def _test_programs() -> Iterator[Finding]:
    """What only tests and Kafka trials need."""
    for program, package, purpose in (
        ("java", "default-jre-headless", "the private Kafka broker"),
        ("mvn", "maven", "fetching that broker"),
        ("chromium", "chromium", "the browser tests"),
        ("node", "nodejs", "the tests with the OpenAI SDK for JavaScript"),
        ("npm", "npm", "fetching that SDK"),
        ("prometheus", "prometheus", "the rule and dashboard tests"),
    ):
        path = shutil.which(program)
        if path:
            yield Finding(program, "ok", path)
        else:
            yield Finding(program, "warn", f"not here: needed for {purpose}", f"apt-get install {package}")
