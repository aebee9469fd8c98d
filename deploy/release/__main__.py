"""``python -m deploy.release --config run/config.toml``: the release controller as a process."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from pathlib import Path

import msgspec

from deploy.release.config import ReleaseConfig
from deploy.release.controller import Controller
from deploy.release.probes import Prober
from deploy.release.store import ReleaseStore
from telemetry import logs, metrics, tracing
from telemetry.config import TelemetryConfig, open_log, redis_client
from telemetry.configuration import InvalidConfiguration, read_table
from telemetry.event_log import PositionLost
from telemetry.manifest import base_digest, base_version
from telemetry.process import announce_ready

log = logging.getLogger("deploy.release")


class _Stack(msgspec.Struct, frozen=True):
    """What is read of ``[stack]``."""

    host: str = "127.0.0.1"
    port: int = 8000


class _Base(msgspec.Struct, frozen=True):
    """What is read of ``[serving.bases.<name>]``: the folder of its weights."""

    model: str


class _Serving(msgspec.Struct, frozen=True):
    bases: dict[str, _Base]


def main(arguments: list[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; 0 on a graceful stop, 1 where the message says what to mend."""
    parser = argparse.ArgumentParser(prog="python -m deploy.release", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the resolved configuration (TOML)")
    path = parser.parse_args(arguments).config
    logs.configure("release")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        serve(path, stop)
    except (InvalidConfiguration, FileNotFoundError, PositionLost) as error:
        log.error("%s", error, extra={"action": "release_stopped"})
        return 1
    return 0


def serve(path: Path, stop: threading.Event) -> None:
    """Build the controller from the configuration and run it."""
    telemetry = read_table(path, "telemetry", TelemetryConfig)
    config = read_table(path, "release", ReleaseConfig)
    provider = tracing.configure("release", otlp_endpoint=telemetry.otlp_endpoint)
    event_log = open_log(telemetry)
    store = ReleaseStore(redis_client(telemetry), config.lease_s)
    controller = Controller(config, _base_versions(path, config), event_log, store, _prober(path, config))
    port = metrics.expose(config.metrics_port)
    url = f"http://127.0.0.1:{port}/metrics"
    try:
        controller.run(stop, lambda: announce_ready(telemetry.state_path, "release", metrics_url=url))
    finally:
        event_log.close()
        provider.shutdown()


def _base_versions(path: Path, config: ReleaseConfig) -> dict[str, str]:
    bases = read_table(path, "serving", _Serving).bases
    wanted = {member.base for members in config.policies.values() for member in members}
    if missing := sorted(wanted - bases.keys()):
        raise InvalidConfiguration(
            f"{path}: [release] names bases without a [serving.bases] table: {', '.join(missing)}"
        )
    return {name: base_version(base_digest(Path(bases[name].model))) for name in wanted}


def _prober(path: Path, config: ReleaseConfig) -> Prober:
    stack = read_table(path, "stack", _Stack)
    host = f"[{stack.host}]" if ":" in stack.host else stack.host
    return Prober(
        config.router_url or f"http://{host}:{stack.port}",
        config.shadow.prompts,
        tokens=config.shadow.probe_tokens,
        timeout_s=config.probe_request_timeout_s,
        api_key=Path(config.router_key_file).read_text().strip() if config.router_key_file else "",
    )


if __name__ == "__main__":
    sys.exit(main())
