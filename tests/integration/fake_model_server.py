"""A small server with vLLM's API that can misbehave on demand. What it shows, the real one cannot show cheaply.

What a well-behaved server does is held by ``make test-vllm`` on a real vLLM, not by this.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web

BASE = "base"
END = 2  # the tiny model's end token


class FakeModelServer:
    """Says the token ids in ``says``; ``mood`` names what goes wrong."""

    def __init__(self) -> None:
        self.mood = ""
        self.says = [72, 105]  # then the end token
        self.adapters: dict[str, str] = {}
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.calls: list[str] = []
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen, on the port of the life before if there was one; adapters are forgotten."""
        self.adapters.clear()
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._complete)
        if self.mood != "no_adapters":
            app.router.add_post("/v1/load_lora_adapter", self._load)
            app.router.add_post("/v1/unload_lora_adapter", self._unload)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _models(self, request: web.Request) -> web.Response:
        self.keys.add(request.headers.get("Authorization"))
        entries = [{"id": BASE, "root": "x", "parent": None, "max_model_len": 200}]
        entries += [{"id": name, "root": root, "parent": BASE} for name, root in self.adapters.items()]
        return web.json_response({"data": entries})

    async def _load(self, request: web.Request) -> web.Response:
        wanted = await request.json()
        self.calls.append(f"load {wanted['lora_name']}")
        if self.mood == "refuses_adapters":
            return web.json_response({"error": {"message": "rank 4 is too large", "code": 500}}, status=500)
        self.adapters[wanted["lora_name"]] = wanted["lora_path"]
        return web.Response(text="Success")

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        self.calls.append(f"unload {name}")
        if self.adapters.pop(name, None) is None:
            return web.json_response({"error": {"message": "cannot be found", "code": 404}}, status=404)
        return web.Response(text="Success")

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        wanted = await request.json()
        self.asked.append(wanted)
        if self.mood.isdigit():
            return web.json_response({"error": {"message": "not now"}}, status=int(self.mood))
        if wanted["model"] not in (BASE, *self.adapters):
            return web.json_response({"error": {"message": "does not exist"}}, status=404)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await self._stream(request, response, wanted)
        return response

    async def _stream(self, request: web.Request, response: web.StreamResponse, wanted: dict[str, Any]) -> None:
        model = "other" if self.mood == "other_model" else wanted["model"]
        for token in [*self.says, END]:
            choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "stop" if token == END else None}
            if self.mood != "no_ids":
                choice |= {"token_ids": [token], "logprobs": {"token_logprobs": [-0.5], "top_logprobs": None}}
            if self.mood == "error_event":
                await self._send(response, {"error": {"message": "bad", "code": 400}})
            else:
                await self._send(response, {"model": model, "choices": [choice]})
            if self.mood == "reset":
                assert request.transport is not None
                request.transport.abort()
                return
            if self.mood == "silent":
                await asyncio.sleep(30)
        usage = {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
        await self._send(response, {"model": model, "choices": [], "usage": usage})
        if self.mood != "no_done":
            await response.write(b"data: [DONE]\n\n")

    async def _send(self, response: web.StreamResponse, document: dict[str, Any]) -> None:
        await response.write(f"data: {json.dumps(document)}\n\n".encode())
