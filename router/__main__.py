"""``python -m router --config STATE/run/config.toml``: the front door on uvicorn; SIGTERM ends it gracefully."""

from __future__ import annotations

import argparse
import gc
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from router.admission import refuse_open_address
from router.app import build_app
from router.config import RouterConfig, StackAddress
from router.protocol import PatientProtocol
from router.services import keys_of
from telemetry import logs, tracing
from telemetry.config import TelemetryConfig
from telemetry.configuration import InvalidConfiguration, read_table
from telemetry.process import announce_ready

GRACE_S = 10  # running answers may take this long to end


class ReadyServer(uvicorn.Server):
    """Tells the launcher when the socket takes requests."""

    def __init__(self, config: uvicorn.Config, state: Path, url: str) -> None:
        super().__init__(config)
        self._state = state
        self._url = url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.collect()
        gc.freeze()  # what is loaded by now stays: a full collection over it would be felt as a slow click
        if self.started:
            announce_ready(self._state, "router", url=self._url, metrics_url=f"{self._url}/metrics")


def listen(address: StackAddress) -> socket.socket:
    """A bound socket; raises InvalidConfiguration when the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((address.host, address.port))
    except OSError as error:
        bound.close()
        where = f"{address.host}:{address.port}"
        raise InvalidConfiguration(f"cannot listen on {where}: {error.strerror}; set another [stack] port") from error
    return bound


def serve(path: Path) -> None:
    """Serve until SIGTERM or SIGINT."""
    telemetry = read_table(path, "telemetry", TelemetryConfig)
    config = read_table(path, "router", RouterConfig)
    address = read_table(path, "stack", StackAddress)
    refuse_open_address(address.host, keys_of(config))
    provider = tracing.configure("router", otlp_endpoint=telemetry.otlp_endpoint)
    bound = listen(address)
    host, port = bound.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    server = ReadyServer(
        uvicorn.Config(
            build_app(config, telemetry),
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
        url,
    )
    for stop in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again after it has stopped
        signal.signal(stop, lambda *_: None)
    server.run(sockets=[bound])
    provider.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m router", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the deployment's TOML")
    arguments = parser.parse_args()
    logs.configure("router")
    try:
        serve(arguments.config)
    except InvalidConfiguration as error:
        print(f"router: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
