"""The door itself: keys, roles, open mode, limits, ids, admin, the OpenAPI document, the process."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
import pytest

from router.app import UNSERVED
from serving.echo_engine import EchoEngine
from telemetry.config import TelemetryConfig
from tests.router_stack import STABLE, Stack, fast, running_stack

KEYS = """
[[keys]]
name = "backend"
sha256 = "{backend}"

[[keys]]
name = "other"
sha256 = "{other}"

[[keys]]
name = "sre"
sha256 = "{sre}"
roles = ["inference", "admin"]
"""


def key_file(folder: Path) -> str:
    path = folder / "keys.toml"
    hashes = {name: hashlib.sha256(f"key-of-{name}".encode()).hexdigest() for name in ("backend", "other", "sre")}
    path.write_text(KEYS.format(**hashes))
    return str(path)


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer key-of-{name}"}


@pytest.fixture
async def stack(telemetry_config: TelemetryConfig) -> AsyncIterator[Stack]:
    async with running_stack(telemetry_config) as running:
        yield running


@pytest.fixture
async def guarded(telemetry_config: TelemetryConfig, tmp_path: Path) -> AsyncIterator[Stack]:
    config = fast(key_file=key_file(tmp_path), max_in_flight=4, max_in_flight_per_key=2)
    async with running_stack(telemetry_config, config=config, engine=EchoEngine(token_s=0.05)) as running:
        yield running


ASK: dict[str, Any] = {"model": "chat", "messages": [{"role": "user", "content": "one two three four"}]}


async def status_of(stack: Stack, headers: dict[str, str], path: str = "/v1/models") -> tuple[int, str]:
    async with stack.http.get(path, headers=headers) as response:
        body = await response.json()
        return response.status, body.get("error", {}).get("code", "")


async def test_with_a_key_file_only_keys_come_in(guarded: Stack) -> None:
    assert await status_of(guarded, bearer("backend")) == (200, "")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "key-of-backend"}, bearer("nobody")):
        assert await status_of(guarded, headers) == (401, "invalid_api_key")
    assert (await status_of(guarded, {}, "/health/ready"))[0] == 200


async def test_only_the_admin_role_moves_releases(guarded: Stack) -> None:
    assert await status_of(guarded, bearer("backend"), "/admin/releases") == (403, "forbidden")
    assert await status_of(guarded, bearer("sre"), "/admin/releases") == (200, "")


async def test_a_pair_can_be_judged_with_the_key_that_asked_for_it_only(guarded: Stack) -> None:
    async with guarded.http.put("/v1/users/ann/consent", json={"pairing": True}, headers=bearer("backend")) as response:
        assert response.status == 200
    body = ASK | {"user": "ann", "preference": {"pair": "always"}}
    async with guarded.http.post("/v1/chat/completions", json=body, headers=bearer("backend")) as response:
        offer = (await response.json())["preference"]
    verdict = {"pair_id": offer["pair_id"], "token": offer["token"], "choice": "a"}
    for name, expected in (("other", 403), ("backend", 201), ("other", 403)):
        async with guarded.http.post("/v1/preferences", json=verdict, headers=bearer(name)) as response:
            assert response.status == expected
            receipt = await response.json()
    async with guarded.http.get(f"/v1/preferences/{receipt.get('id', 'none')}", headers=bearer("other")) as response:
        assert response.status in (403, 404)


async def test_too_many_at_once_are_told_when_to_come_back(guarded: Stack) -> None:
    async def ask(name: str) -> tuple[int, str | None]:
        async with guarded.http.post("/v1/chat/completions", json=ASK, headers=bearer(name)) as response:
            await response.read()
            return response.status, response.headers.get("Retry-After")

    one_key = await asyncio.gather(*(ask("backend") for _ in range(4)))
    assert sorted(one_key) == [(200, None), (200, None), (429, "1"), (429, "1")]
    names = ("backend", "backend", "other", "other", "sre")
    everyone = await asyncio.gather(*(ask(name) for name in names))
    assert sorted(everyone) == [(200, None)] * 4 + [(503, "1")]
    assert (await ask("backend"))[0] == 200, "places are given back"


async def test_open_mode_answers_only_this_machines_own_pages(stack: Stack) -> None:
    port = stack.url.rsplit(":", 1)[1]
    for headers, expected in (
        ({"Host": f"localhost:{port}"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "[::1"}, 403),  # no host at all
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": stack.url}, 200),
    ):
        assert (await status_of(stack, headers))[0] == expected


async def test_a_request_keeps_its_id_and_a_bad_one_gets_another(stack: Stack) -> None:
    async with stack.http.get("/health/live", headers={"X-Request-ID": "abc-1"}) as response:
        assert response.headers["X-Request-ID"] == "abc-1"
    async with stack.http.get("/health/live", headers={"X-Request-ID": "a b<c>"}) as response:
        assert re.fullmatch(r"[0-9a-f-]{36}", response.headers["X-Request-ID"])


async def test_every_error_has_openais_shape(stack: Stack) -> None:
    calls: list[tuple[str, str, bytes, int]] = [
        ("GET", "/nowhere", b"", 404),
        ("DELETE", "/v1/models", b"", 405),
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b" " * (1 << 20), 413),
        ("POST", "/v1/preferences", b"{}", 400),
        ("PUT", "/v1/users/ann/consent", b'{"pairing": "maybe"}', 400),
        ("POST", "/v1/feedback", b'{"completion_id": "x", "rating": 2}', 400),
    ]
    for method, path, body, expected in calls:
        async with stack.http.request(method, path, data=body) as response:
            error = (await response.json())["error"]
            assert response.status == expected
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"] and error["type"] and error["code"]


async def test_releases_show_the_table_and_the_history_and_orders_are_queued(stack: Stack) -> None:
    await stack.redis.lpush("tiebreak:releases:history", b'{"version": "v000001-aaaaaaaa", "state": "stable"}')  # type: ignore[misc]
    async with stack.http.get("/admin/releases") as response:
        document = await response.json()
    assert document["routing"]["policies"]["chat"][0]["stable"] == STABLE
    assert document["history"] == [{"version": "v000001-aaaaaaaa", "state": "stable"}]
    async with stack.http.post(f"/admin/releases/{STABLE}/rollback", json={"reason": "bad day"}) as response:
        assert response.status == 202
    async with stack.http.post(f"/admin/releases/{STABLE}/promote", json={"force": True}) as response:
        assert response.status == 202
    async with stack.http.post("/admin/releases/nonsense/promote") as response:
        assert response.status == 400
    queued = [json.loads(entry) for entry in await stack.redis.lrange("tiebreak:releases:commands", 0, -1)]  # type: ignore[misc]
    common = {"version": STABLE, "actor": "operator"}
    assert queued == [
        common | {"command": "rollback", "force": False, "reason": "bad day"},
        common | {"command": "promote", "force": True, "reason": ""},
    ]


async def test_the_release_controller_understands_what_is_queued(stack: Stack) -> None:
    from deploy.release.intake import parse_command

    async with stack.http.post(f"/admin/releases/{STABLE}/promote", json={"force": True}) as response:
        assert response.status == 202
    [payload] = await stack.redis.lrange("tiebreak:releases:commands", 0, -1)  # type: ignore[misc]
    command = parse_command(payload)
    assert (command.command, command.version, command.force) == ("promote", STABLE, True)


async def test_the_openapi_document_describes_the_answers_as_they_are(stack: Stack) -> None:
    async with stack.http.get("/openapi.json") as response:
        document = await response.json()
    answers = {
        ("/v1/chat/completions", "post", "200"): (await stack.ask())[1],
        ("/v1/models", "get", "200"): await (await stack.http.get("/v1/models")).json(),
        ("/v1/models/{id}", "get", "200"): await (await stack.http.get("/v1/models/chat@stable")).json(),
        ("/health/ready", "get", "200"): await (await stack.http.get("/health/ready")).json(),
        ("/admin/releases", "get", "200"): await (await stack.http.get("/admin/releases")).json(),
        ("/admin/versions", "get", "200"): await (await stack.http.get("/admin/versions")).json(),
        ("/v1/users/{user}/consent", "get", "200"): await (await stack.http.get("/v1/users/ann/consent")).json(),
    }
    pair = await stack.pair()
    _, receipt = await stack.click(pair)
    answers["/v1/preferences", "post", "201"] = receipt
    answers["/v1/preferences/{id}", "get", "200"] = await (await stack.http.get(receipt["links"]["self"])).json()
    answers["/v1/chat/completions", "post", "404"] = (await stack.ask(model="nobody"))[1]
    for (path, method, status), body in answers.items():
        schema = document["paths"][path][method]["responses"][status]["content"]["application/json"]["schema"]
        jsonschema.validate(body, schema | {"components": document["components"]})


async def test_every_described_route_is_there_and_every_route_is_described(stack: Stack) -> None:
    async with stack.http.get("/openapi.json") as response:
        paths = (await response.json())["paths"]
    for path, methods in paths.items():
        for method in methods:
            async with stack.http.request(method, re.sub(r"{\w+}", "x", path)) as response:
                assert response.status != 405
                if response.status == 404 and "/x" not in re.sub(r"{\w+}", "x", path):
                    assert path in ("/", *UNSERVED), "only the page may be missing"
    for path in ("/docs", "/metrics", "/openapi.json", "/health/live", "/health/ready", "/v1/feedback", "/"):
        assert path in paths


async def test_the_docs_page_needs_nothing_from_elsewhere(stack: Stack) -> None:
    async with stack.http.get("/docs") as response:
        page = await response.text()
    assert response.content_type == "text/html"
    assert "://" not in page


async def test_pages_have_their_types(stack: Stack) -> None:
    async with stack.http.get("/pages/app.js") as response:
        assert (response.status, response.content_type) == (200, "text/javascript")
    async with stack.http.get("/") as response:
        assert (response.status, response.content_type) == (200, "text/html")
    async with stack.http.get("/pages/../app.py") as response:
        assert response.status == 404


def write_config(folder: Path, telemetry: TelemetryConfig, **stack: Any) -> Path:
    path = folder / "config.toml"
    host, port = stack.get("host", "127.0.0.1"), stack.get("port", 0)
    lines = [
        f'[stack]\nhost = "{host}"\nport = {port}\n[telemetry]',
        f'state = "{telemetry.state}"\nredis_url = "{telemetry.redis_url}"',
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def start_process(config: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "router", "--config", str(config)], stderr=subprocess.PIPE, text=True, env=os.environ
    )


async def test_the_process_announces_itself_serves_and_stops_cleanly(
    telemetry_config: TelemetryConfig, tmp_path: Path
) -> None:
    process = start_process(write_config(tmp_path, telemetry_config))
    ready = telemetry_config.state_path / "run" / "router.ready"
    try:
        deadline = time.monotonic() + 30
        while not ready.exists():
            assert process.poll() is None and time.monotonic() < deadline
            await asyncio.sleep(0.05)
        announced = json.loads(ready.read_text())
        assert announced["pid"] == process.pid
        async with aiohttp.ClientSession() as session, session.get(announced["metrics_url"]) as response:
            assert "tiebreak_requests_in_flight" in await response.text()
        process.send_signal(signal.SIGTERM)
        _, errors = await asyncio.to_thread(process.communicate, timeout=20)
        assert process.returncode == 0, errors
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
def test_without_keys_no_address_but_loopback_is_served(
    telemetry_config: TelemetryConfig, tmp_path: Path, host: str
) -> None:
    process = start_process(write_config(tmp_path, telemetry_config, host=host))
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "loopback only" in errors and "key_file" in errors and "Traceback" not in errors


def test_a_port_in_use_is_one_clear_line(telemetry_config: TelemetryConfig, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start_process(write_config(tmp_path, telemetry_config, port=port))
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert f"127.0.0.1:{port}" in errors and "[stack] port" in errors and "Traceback" not in errors


def test_the_router_loads_neither_torch_nor_ray() -> None:
    code = "import sys, router.app; sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'kafka')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_operators_see_which_replica_holds_what(stack: Stack) -> None:
    async with stack.http.get("/admin/versions") as response:
        seen = await response.json()
    (replica,) = seen["replicas"]
    assert {held["version"]: held["wanted_by"] for held in replica["versions"]}[STABLE] == ["chat-main stable"]


@pytest.mark.parametrize("path", UNSERVED)
async def test_an_endpoint_of_openai_that_is_not_served_says_what_is(stack: Stack, path: str) -> None:
    async with stack.http.post(path, json={"model": "chat", "input": "Hello"}) as response:
        error = (await response.json())["error"]
    assert (response.status, error["code"]) == (404, "unsupported_endpoint")
    assert "/v1/chat/completions" in error["message"]
