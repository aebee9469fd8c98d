"""``python -m serving --config FILE``: Ray Serve, one application per base, and the fleet's control loop.

Announces ready when every replica answers and holds what the routing table wants. SIGTERM drains, stops
Serve and Ray, and leaves no process behind.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import aiohttp

from serving.config import ServingConfig
from telemetry import logs
from telemetry.config import TelemetryConfig, redis_client_async
from telemetry.configuration import InvalidConfiguration, read_table
from telemetry.metrics import expose
from telemetry.process import announce_ready

log = logging.getLogger("serving")
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
    # Ray's session lies in a short path: its sockets' names have at most 107 bytes
    temp = Path(tempfile.mkdtemp(prefix="tiebreak-ray-"))
    try:
        asyncio.run(_serve(config, telemetry, temp))
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return 0


async def _serve(config: ServingConfig, telemetry: TelemetryConfig, temp: Path) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    os.environ.update(ENVIRONMENT)
    os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"] = str(config.first_port)
    os.environ["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"] = str(config.first_port + 1000)
    from serving import app  # after the environment: Ray reads it when it is imported

    state = telemetry.state_path
    metrics_port = expose(config.metrics_port)
    try:
        await asyncio.to_thread(app.start_serve, config, temp)
        await asyncio.to_thread(app.deploy, config, state)
        await _control(config, telemetry, stopped, metrics_port)
    finally:
        await asyncio.to_thread(app.stop_serve, config)


async def _control(
    config: ServingConfig, telemetry: TelemetryConfig, stopped: asyncio.Event, metrics_port: int
) -> None:
    from serving.app import replica_urls
    from serving.fleet import Fleet

    redis = redis_client_async(telemetry)
    async with aiohttp.ClientSession() as session:
        bases = {name: base.replicas for name, base in config.bases.items()}
        fleet = Fleet(bases, replica_urls, redis, session)
        loop = asyncio.create_task(fleet.run(config.interval_s))
        ending = asyncio.create_task(stopped.wait())
        while not fleet.is_settled and not ending.done() and not loop.done():
            await asyncio.wait((ending, loop), timeout=0.05)
        if fleet.is_settled:
            announce_ready(telemetry.state_path, "serving", metrics_url=f"http://127.0.0.1:{metrics_port}/metrics")
            log.info("ready", extra={"action": "ready", "bases": list(config.bases)})
        await asyncio.wait((ending, loop), return_when=asyncio.FIRST_COMPLETED)
        if loop.done():
            loop.result()
        loop.cancel()
    await redis.aclose()


if __name__ == "__main__":
    sys.exit(main())
