"""Ray Serve as the control plane: one application per base model, replicas that answer HTTP themselves.

Serve places, watches, restarts and drains replicas; with direct ingress each one listens on a port of its
own, so tokens never pass through Ray. ``replica_urls`` asks Serve's controller who runs where.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from serving.config import BaseConfig, ServingConfig
from serving.errors import ControlPlaneAway, EngineFailed
from serving.replica import build_replica
from telemetry.logs import JsonFormatter

log = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"
START_TRIES = 3
REPLICA_NAME = "SERVE_REPLICA::"  # how Serve names replica actors; a base without replicas shows its proxy
CONTROL_S = 5.0  # the controller's answer to "who runs where" may take this long
SHUTDOWN_S = 10.0  # what Ray gets to stop by itself, and then its own processes; nothing in them is worth waiting for
LAST_WORDS_S = 2.0


@serve.ingress()
class Replica:
    """One replica process: builds the engine and hands its ASGI app to Serve."""

    def __init__(self, base: str, config: BaseConfig, state: Path, blocked_patterns: tuple[str, ...]) -> None:
        replica_id = serve.get_replica_context().replica_id.unique_id
        _log_to(state / "logs" / f"replica-{base}.log", f"replica-{replica_id}")
        self._engine, self._app = build_replica(
            base, config, state=state, replica_id=replica_id, blocked_patterns=blocked_patterns
        )

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    async def check_health(self) -> None:
        """Serve replaces a replica whose engine cannot answer any more."""
        if not self._engine.is_healthy():
            raise EngineFailed()


def _log_to(path: Path, process: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(JsonFormatter(process))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)


def start_ray(config: ServingConfig, temp: Path) -> None:
    """Start a Ray cluster for this process alone, its session in ``temp``, or join the configured one.

    On a crowded machine Ray gives up on its own processes after 30 s, so a local start is tried again.
    """
    if config.ray_address:
        ray.init(address=config.ray_address, log_to_driver=False)
        return
    for tries_left in reversed(range(START_TRIES)):
        before = set(psutil.Process().children(recursive=True))
        try:
            return _start_local(config, temp)
        except Exception as error:  # a retry wrapper: Ray raises a plain Exception here
            for child in set(psutil.Process().children(recursive=True)) - before:
                child.kill()
            if not tries_left:
                raise ControlPlaneAway(f"Ray did not start in {START_TRIES} tries: {error}") from error
            log.warning("Ray did not start, trying again: %s", error, extra={"action": "ray_retried"})


def _start_local(config: ServingConfig, temp: Path) -> None:
    replicas = sum(base.replicas for base in config.bases.values())
    ray.init(
        address="local",
        num_cpus=replicas + 1,  # logical: a replica is not kept out by a small machine
        include_dashboard=False,
        object_store_memory=80 * 1024 * 1024,  # Ray's least; no data travels through it
        log_to_driver=False,
        logging_level=logging.WARNING,
        _temp_dir=str(temp),
    )


def start_serve(config: ServingConfig) -> None:
    """Start Serve's controller. It starts a proxy, too, whatever we say; nothing uses it, so any port will do."""
    serve.start(
        http_options=HTTPOptions(host="0.0.0.0" if config.ray_address else LOOPBACK, port=_free_port()),
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )


def deploy(config: ServingConfig, state: Path) -> None:
    """One application per base; returns when their replicas run."""
    targets = []
    for name, base in config.bases.items():
        deployment = serve.deployment(
            name="replica",
            num_replicas=base.replicas,
            max_ongoing_requests=base.max_batch + base.max_queue + 64,  # the engine sheds, with a clear answer
            max_queued_requests=64,
            health_check_period_s=2.0,
            health_check_timeout_s=20.0,
            graceful_shutdown_wait_loop_s=0.5,
            graceful_shutdown_timeout_s=20.0,
            ray_actor_options={"num_cpus": 1, "num_gpus": base.gpus},
        )(Replica)
        target = deployment.bind(name, base, state, config.blocked_patterns)
        targets.append(serve.RunTarget(target, name=name, route_prefix=f"/{name}"))
    serve.run_many(targets)


def stop_serve(config: ServingConfig) -> None:
    """End our applications in a cluster that others may use; a cluster of our own ends as a whole, in bounded time.

    ``ray.shutdown`` waits a minute for a raylet that hangs, and the agents of one that was killed as long for a
    server that is gone.
    """
    if not ray.is_initialized():
        return
    if config.ray_address:
        for name in config.bases:
            serve.delete(name)
        ray.shutdown()
        return
    family = psutil.Process().children(recursive=True)
    patience = threading.Timer(SHUTDOWN_S, _kill, (family,))
    patience.daemon = True
    patience.start()
    try:
        ray.shutdown()
    finally:
        patience.cancel()
        _, left = psutil.wait_procs(family, timeout=LAST_WORDS_S)
        _kill(left)


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


async def replica_urls(base: str, *, host: str = "") -> list[str]:
    """Base URLs of the running replicas of ``base``; raises ControlPlaneAway when Serve does not answer.

    ``host`` takes the place of the node's address: replicas of a Ray of our own listen on loopback only.
    """
    try:
        reference = _client()._controller.get_target_groups.remote(app_name=base)
        groups = await asyncio.wait_for(reference, CONTROL_S)
    except (RayError, RayServeException, TimeoutError) as error:
        raise ControlPlaneAway(f"Serve's controller does not say where {base} runs: {error}") from error
    return [
        f"http://{host or target.ip}:{target.port}{group.route_prefix}"
        for group in groups
        if group.app_name == base
        for target in group.targets
        if target.name.startswith(REPLICA_NAME)
    ]


def _client() -> Any:
    """Serve's own client: its public interface names no replica's address."""
    return _get_global_client()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
