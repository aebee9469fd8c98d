"""Ray Serve's usual way to stream: its HTTP proxy, an ingress deployment, one handle to the deployment that answers.

``python -m tests.bench.ray_proxy PORT FOLDER`` serves ``POST /``: ``max_tokens`` events, ``TOKEN_S`` apart.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import AsyncGenerator
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig
from starlette.requests import Request
from starlette.responses import StreamingResponse

TOKEN_S = 0.001
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}\n\n'
AT_ONCE = 256


@serve.deployment(max_ongoing_requests=AT_ONCE)
class Model:
    """Says nothing, a token at a time."""

    async def generate(self, tokens: int) -> AsyncGenerator[bytes]:
        for _ in range(tokens):
            await asyncio.sleep(TOKEN_S)
            yield EVENT


@serve.deployment(max_ongoing_requests=AT_ONCE)
class Ingress:
    """Streams what the model says."""

    def __init__(self, model: Any) -> None:
        self._model = model.options(stream=True)

    async def __call__(self, request: Request) -> StreamingResponse:
        tokens = (await request.json())["max_tokens"]
        return StreamingResponse(self._model.generate.remote(tokens), media_type="text/event-stream")


def main() -> None:
    port, folder = int(sys.argv[1]), sys.argv[2]
    stopped = threading.Event()
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=folder,
        object_store_memory=80 * 1024 * 1024,
    )  # fmt: skip
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port), logging_config=quiet)
    serve.run(Ingress.bind(Model.bind()), route_prefix="/")  # type: ignore[attr-defined]  # serve adds bind
    stopped.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
