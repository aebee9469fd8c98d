"""``python -m serving --config FILE``: Ray Serve, one application per base, and the fleet's control loop.

Announces ready when every replica answers and holds what the routing table wants. SIGTERM drains, stops
Serve and Ray, and leaves no process behind.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import aiohttp
import msgspec
from redis.exceptions import RedisError

from serving.config import ServingConfig
from telemetry import logs
from telemetry.config import TelemetryConfig, redis_client, redis_client_async
from telemetry.configuration import InvalidConfiguration, read_table
from telemetry.metrics import expose
from telemetry.process import announce_ready
from telemetry.routing import REPLICAS_KEY, ReplicaTable

log = logging.getLogger("serving")
DRAIN_S = 15.0  # answers under way may finish; the router has stopped sending by then
# What Ray, its workers and torch in them read when they start.
ENVIRONMENT = {
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
    # the router leaves a draining replica by itself; waiting longer would only delay a stop
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    # our code never blocks the event loop, so no message needs to change threads
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # trainer and replica share the cores: a thread that spins at a barrier takes time from the one it waits for
    "OMP_WAIT_POLICY": "PASSIVE",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m serving", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the resolved configuration (TOML)")
    path: Path = parser.parse_args().config
    logs.configure("serving")
    try:
        config = read_table(path, "serving", ServingConfig)
        telemetry = read_table(path, "telemetry", TelemetryConfig)
    except InvalidConfiguration as error:
        print(error, file=sys.stderr)
        return 2
    os.environ.update(ENVIRONMENT)
    os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"] = str(config.first_port)
    os.environ["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"] = str(config.first_port + 1000)
    if not config.ray_address:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Ray's session lies in a short path: its sockets' names have at most 107 bytes
    temp = Path(tempfile.mkdtemp(prefix="tiebreak-ray-"))
    try:
        _serve(config, telemetry, temp)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return 0


def _serve(config: ServingConfig, telemetry: TelemetryConfig, temp: Path) -> None:
    """Start, control until told to stop, stop. Ray wants the main thread: it sets signal handlers of its own."""
    _exit_on_sigterm()
    _forget_replicas(config, telemetry)  # first of all: a router that starts beside us reads that table within a second
    from serving import app  # after the environment: Ray reads it when it is imported

    try:
        app.start_ray(config, temp)
        _exit_on_sigterm()
        app.start_serve(config)
        app.deploy(config, telemetry.state_path)
        asyncio.run(_control(config, telemetry))
    except Stopped:
        log.info("stopped while starting", extra={"action": "stopped"})
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _forget_replicas(config, telemetry)
        app.stop_serve(config)


def _forget_replicas(config: ServingConfig, telemetry: TelemetryConfig) -> None:
    """Replicas die with the Ray that we start: nobody shall take their table for that of the next ones."""
    if config.ray_address:
        return
    try:
        with redis_client(telemetry) as client:
            client.set(REPLICAS_KEY, msgspec.json.encode(ReplicaTable(time.time(), ())))
    except (RedisError, OSError) as error:
        log.warning("the last replica table stays: %s", error, extra={"action": "replicas_not_forgotten"})


class Stopped(SystemExit):
    """SIGTERM came while Ray was starting."""


def _exit_on_sigterm() -> None:
    def stop(*_: object) -> None:
        raise Stopped(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


async def _control(config: ServingConfig, telemetry: TelemetryConfig) -> None:
    """The fleet's loop until SIGTERM; announces ready as soon as the fleet is what it should be."""
    from serving.app import LOOPBACK, replica_urls
    from serving.fleet import Fleet

    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    metrics_port = expose(config.metrics_port)
    redis = redis_client_async(telemetry)
    async with aiohttp.ClientSession() as session:
        bases = {name: base.replicas for name, base in config.bases.items()}
        urls = partial(replica_urls, host="" if config.ray_address else LOOPBACK)
        fleet = Fleet(bases, urls, redis, session)
        loop = asyncio.create_task(fleet.run(config.interval_s))
        ending = asyncio.create_task(stopped.wait())
        while not (fleet.is_settled or ending.done() or loop.done()):
            await asyncio.wait((ending, loop), timeout=0.05)
        if fleet.is_settled:
            announce_ready(telemetry.state_path, "serving", metrics_url=f"http://127.0.0.1:{metrics_port}/metrics")
            log.info("ready", extra={"action": "ready", "bases": list(config.bases)})
        await asyncio.wait((ending, loop), return_when=asyncio.FIRST_COMPLETED)
        if loop.done():
            loop.result()
        loop.cancel()
        await fleet.drain(DRAIN_S)
    await redis.aclose()


if __name__ == "__main__":
    sys.exit(main())
