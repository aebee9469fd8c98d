"""The OpenAPI document against the live router, by a fuzzer: what it allows is answered, what it forbids refused.

Schemathesis walks every operation's limits, then draws at random, always the same. It runs as a process: its requests
block, and the router is in this one.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from telemetry.config import TelemetryConfig
from tests.router_stack import STABLE, Stack, running_stack

pytestmark = pytest.mark.usefixtures("redis_server")
ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).with_name("fuzz.toml")
PROGRAM = "import sys; from schemathesis.cli import schemathesis; sys.exit(schemathesis())"


async def known(stack: Stack) -> dict[str, Any]:
    """Names and tokens that the router knows, by operation."""
    _, answer, _ = await stack.ask()
    offer = (await stack.pair())["preference"]
    _, receipt = await stack.click(await stack.pair())
    verdict = {"pair_id": offer["pair_id"], "token": offer["token"]}
    return {
        "POST /v1/chat/completions": {"body": {"model": "chat"}},
        "POST /v1/preferences": {"body": verdict},
        "GET /v1/preferences/{id}": {"path": {"id": receipt["id"]}},
        "DELETE /v1/preferences/{id}": {"path": {"id": receipt["id"]}},
        "POST /v1/feedback": {"body": {"completion_id": answer["id"]}},
        "GET /v1/models/{id}": {"path": {"id": f"chat@{STABLE}"}},
        "GET /pages/{name}": {"path": {"name": "app.js"}},
    }


async def test_the_router_does_what_its_openapi_document_says(
    telemetry_config: TelemetryConfig, tmp_path: Path
) -> None:
    async with running_stack(telemetry_config) as stack:
        environ = os.environ | {"TIEBREAK_KNOWN": json.dumps(await known(stack)), "PYTHONPATH": str(ROOT)}
        url = f"{stack.url}/openapi.json"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, "--config-file", str(CONFIG), "run", url, "--no-color",
            cwd=tmp_path, env=environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        said, _ = await process.communicate()
        assert process.returncode == 0, said.decode()
        assert await stack.metric("tiebreak_requests_total", code="200") > 20, "hardly any request reached a model"
