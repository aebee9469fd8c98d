"""``python -m router --config STATE/run/config.toml``: the front door on uvicorn; SIGTERM ends it gracefully.

With ``[router] workers`` above 1 each worker is such a process, told its number; the kernel spreads connections.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from router.admission import refuse_open_address
from router.app import build_app
from router.config import RouterConfig, StackAddress, worker_name
from router.protocol import PatientProtocol
from router.services import keys_of
from telemetry import logs, metrics, tracing
from telemetry.config import TelemetryConfig
from telemetry.configuration import InvalidConfiguration, read_table
from telemetry.process import announce_ready, keep_what_is_loaded

GRACE_S = 10  # running answers may take this long to end


class ReadyServer(uvicorn.Server):
    """Tells the launcher when the socket takes requests."""

    def __init__(self, config: uvicorn.Config, state: Path, name: str, **said: str) -> None:
        super().__init__(config)
        self._state, self._name, self._said = state, name, said

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        keep_what_is_loaded()
        if self.started:
            announce_ready(self._state, self._name, **self._said)


def listen(address: StackAddress, *, is_shared: bool = False) -> socket.socket:
    """A bound socket, with others on the same port if it ``is_shared``.

    Raises InvalidConfiguration when the address is taken or not ours.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if is_shared:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind((address.host, address.port))
    except OSError as error:
        bound.close()
        where = f"{address.host}:{address.port}"
        raise InvalidConfiguration(f"cannot listen on {where}: {error.strerror}; set another [stack] port") from error
    return bound


def serve(path: Path, worker: int) -> None:
    """Serve as ``worker`` (from 1) until SIGTERM or SIGINT."""
    telemetry = read_table(path, "telemetry", TelemetryConfig)
    config = read_table(path, "router", RouterConfig)
    address = read_table(path, "stack", StackAddress)
    refuse_open_address(address.host, keys_of(config))
    if config.workers > 1:
        _join_workers(config, worker)
    provider = tracing.configure("router", otlp_endpoint=telemetry.otlp_endpoint)
    bound = listen(address, is_shared=config.workers > 1)
    host, port = bound.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    server = ReadyServer(
        uvicorn.Config(
            build_app(config, telemetry, worker=worker),
            loop="uvloop",
            http=PatientProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nothing here asks for the client's address
            timeout_graceful_shutdown=GRACE_S,
        ),
        telemetry.state_path,
        worker_name(worker),
        url=url,
        # one address is scraped, and any worker answers there for all
        **({"metrics_url": f"{url}/metrics"} if worker == 1 else {}),
    )
    for stop in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again after it has stopped
        signal.signal(stop, lambda *_: None)
    server.run(sockets=[bound])
    provider.shutdown()


def _join_workers(config: RouterConfig, worker: int) -> None:
    """Raises InvalidConfiguration where workers would not count together."""
    if not 1 <= worker <= config.workers:
        raise InvalidConfiguration(f"--worker {worker}: [router] workers is {config.workers}")
    if metrics.SHARED_FOLDER not in os.environ:
        raise InvalidConfiguration(
            f"[router] workers is {config.workers}: set {metrics.SHARED_FOLDER} to a folder that all of them share, "
            "or start them with `tiebreak up`"
        )
    metrics.forget_dead_processes()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m router", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the deployment's TOML")
    parser.add_argument("--worker", type=int, default=1, help="which of [router] workers this is, from 1")
    arguments = parser.parse_args()
    logs.configure(worker_name(arguments.worker))
    try:
        serve(arguments.config, arguments.worker)
    except InvalidConfiguration as error:
        print(f"router: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
