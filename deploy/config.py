"""The deployment's configuration made whole: one TOML in, ``STATE/run/config.toml`` out, read by every process.

What people leave open is filled in here: where state lies, the address, Redis, the folders of prepared base models.
Order: defaults < TOML < ``TIEBREAK_…`` environment < command line. Nothing is started here.
"""

from __future__ import annotations

import os
import tempfile
import tomllib
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from telemetry.config import TelemetryConfig
from telemetry.configuration import InvalidConfiguration, convert_table

DEFAULT = Path(__file__).with_name("local.toml")
LONGEST_SOCKET_PATH = 100  # a Unix socket's path has at most 107 bytes


class StackConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[stack]``: what the launcher itself needs to know."""

    # Where the router listens. Without a key file only loopback is allowed.
    host: str = "127.0.0.1"
    port: int = 8000
    # Threads that one process may compute with. More than there are cores makes all of them slower.
    serving_threads: int = 2
    trainer_threads: int = 2
    # Niceness of what nobody waits for (trainer, recorder, release controller): answers and clicks go first.
    background_nice: int = 5
    # Seconds until every process must have announced that it serves, and those a process has to stop.
    ready_timeout_s: float = 180.0
    stop_timeout_s: float = 20.0
    # What must be free at the start; below it the stack would die later, in the middle of something.
    min_free_memory_gb: float = 3.0
    min_free_disk_gb: float = 1.0

    @property
    def url(self) -> str:
        """What people open."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """One resolved deployment."""

    stack: StackConfig
    telemetry: TelemetryConfig
    document: dict[str, Any]  # the whole configuration, as every process reads it
    owns_redis: bool  # a private Redis is the launcher's to start

    @property
    def state(self) -> Path:
        return self.telemetry.state_path

    @property
    def run_folder(self) -> Path:
        return self.state / "run"

    @property
    def config_path(self) -> Path:
        return self.run_folder / "config.toml"

    @property
    def router_workers(self) -> int:
        """Processes that answer on the one port, as they themselves will read it."""
        from router.config import RouterConfig

        return convert_table(self.document.get("router", {}), "router", RouterConfig).workers

    @property
    def has_keys(self) -> bool:
        """Clients must authenticate."""
        return bool(self.document.get("router", {}).get("key_file"))


def load(
    path: Path,
    *,
    state: str = "",
    port: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> Deployment:
    """The deployment at ``path``; ``state`` and ``port`` are the command line's. No model is prepared yet.

    Raises InvalidConfiguration that names the table and key.
    """
    environ = os.environ if environ is None else environ
    try:
        document = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InvalidConfiguration(f"{path}: {error}") from error
    shown = {"stack": _override(document, "stack", "port", port, environ.get("TIEBREAK_PORT"))}
    shown["telemetry"] = _override(document, "telemetry", "state", state, environ.get("TIEBREAK_STATE"))
    stack = convert_table(shown["stack"], "stack", StackConfig, environ, where=str(path))
    telemetry = convert_table(shown["telemetry"], "telemetry", TelemetryConfig, environ, where=str(path))
    owns_redis = not telemetry.redis_url
    telemetry = msgspec.structs.replace(telemetry, state=str(telemetry.state_path))
    if owns_redis:
        telemetry = msgspec.structs.replace(telemetry, redis_url=f"unix://{socket_path(telemetry.state_path)}?db=0")
    document |= {"stack": msgspec.to_builtins(stack), "telemetry": msgspec.to_builtins(telemetry)}
    return Deployment(stack=stack, telemetry=telemetry, document=document, owns_redis=owns_redis)


def _override(
    document: Mapping[str, Any], table: str, key: str, from_command: object, from_environ: str | None
) -> dict[str, Any]:
    """``[table]`` with ``key`` from the command line, else from the environment, else as it is."""
    values = dict(document.get(table, {}))
    if from_command:
        values[key] = from_command
    elif from_environ:
        values[key] = from_environ
    return values


def socket_path(state: Path) -> Path:
    """The private Redis's socket: in ``state``, or in the temporary folder where that path is too long."""
    path = state / "run" / "redis.sock"
    if len(os.fsencode(path)) <= LONGEST_SOCKET_PATH:
        return path
    name = f"tiebreak-{os.getuid()}-{zlib.crc32(os.fsencode(state)):08x}"
    return Path(tempfile.gettempdir()) / name / "redis.sock"


def model_cache() -> Path:
    """Where prepared base models lie, shared by all deployments of this user."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "tiebreak" / "models"


def resolve(deployment: Deployment, prepare: Callable[[str, Path], Path]) -> Deployment:
    """``prepared``, and written to ``config_path``."""
    resolved = prepared(deployment, prepare)
    write(resolved)
    return resolved


def prepared(deployment: Deployment, prepare: Callable[[str, Path], Path]) -> Deployment:
    """``deployment`` with every base model prepared, checked table by table.

    ``prepare`` is deploy.models.prepare_model; what it raises goes through.
    """
    document = {**deployment.document}
    bases = document.get("serving", {}).get("bases", {})
    if not bases:
        raise InvalidConfiguration("no [serving.bases.<name>] table: name at least one base model there")
    folders = {name: str(prepare(_model_of(name, table), model_cache())) for name, table in bases.items()}
    document["serving"] = {
        **document["serving"],
        "bases": {name: {**table, "model": folders[name]} for name, table in bases.items()},
    }
    document["trainer"] = _with_model(document.get("trainer", {}), folders)
    check_tables(document, str(deployment.config_path))
    return msgspec.structs.replace(deployment, document=document)


def _model_of(name: str, table: Mapping[str, Any]) -> str:
    model = table.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidConfiguration(f"[serving.bases.{name}]: model is missing: package:NAME, a folder or a hub name")
    return model


def _with_model(trainer: Mapping[str, Any], folders: Mapping[str, str]) -> dict[str, Any]:
    """``[trainer]`` with the folder of the base it trains; an explicit one stays."""
    base = trainer.get("base", next(iter(folders)))
    if base not in folders:
        raise InvalidConfiguration(f"[trainer]: base {base!r} has no [serving.bases.{base}] table")
    return {**trainer, "base": base, "model": trainer.get("model") or folders[base]}


def check_tables(document: Mapping[str, Any], where: str) -> None:
    """Refuse now what a process would refuse later, in its log."""
    from deploy.release.config import ReleaseConfig
    from online_trainer.config import TrainerConfig
    from router.config import RouterConfig
    from serving.config import ServingConfig

    tables: dict[str, type[msgspec.Struct]] = {
        "router": RouterConfig,
        "serving": ServingConfig,
        "trainer": TrainerConfig,
        "release": ReleaseConfig,
    }
    for name, cls in tables.items():
        convert_table(document.get(name, {}), name, cls, where=where)
    _check_release(document, where)
    unknown = set(document) - set(tables) - {"stack", "telemetry"}
    if unknown:
        raise InvalidConfiguration(f"{where}: unknown tables: {', '.join(sorted(unknown))}")


def _check_release(document: Mapping[str, Any], where: str) -> None:
    """Policies name bases that are served, and the trainer trains a variant that one of them has."""
    members = [member for policy in document["release"]["policies"].values() for member in policy]
    bases = document["serving"]["bases"]
    if missing := sorted({member["base"] for member in members} - set(bases)):
        raise InvalidConfiguration(f"{where}: [release.policies] name bases that are not served: {', '.join(missing)}")
    trained = document["trainer"].get("variant")
    variants = sorted({member["variant"] for member in members})
    if trained and trained not in variants:
        raise InvalidConfiguration(f"{where}: [trainer]: no policy has variant {trained!r}; there are {variants}")


def write(deployment: Deployment) -> None:
    """Write ``config_path`` in one step, so that a process never reads half of it."""
    path = deployment.config_path
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_text("# Resolved by the launcher at its start; edit the file it came from.\n\n")
    with staging.open("ab") as file:
        tomli_w.dump(deployment.document, file)
    staging.rename(path)
