"""A small client of the gateway's HTTP API, for simulated users and for the command line. By HTTP only."""

from __future__ import annotations

from typing import Any

import aiohttp
import msgspec


class ApiError(RuntimeError):
    """The gateway refused, or cannot be reached; the message is its own."""

    def __init__(self, message: str, *, status: int = 0, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Answer(msgspec.Struct, frozen=True):
    """One chat completion: one text, or two when it is a pair."""

    texts: tuple[str, ...]
    version: str  # empty for a pair: hidden until the verdict
    pair_id: str = ""
    token: str = ""

    @property
    def is_pair(self) -> bool:
        return bool(self.pair_id)


class Api:
    """One gateway. Not for several event loops."""

    def __init__(self, session: aiohttp.ClientSession, url: str, *, key: str = "") -> None:
        self._session = session
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def call(self, method: str, path: str, body: Any = None) -> tuple[dict[str, Any], Any]:
        """(body, headers) of a 2xx answer; raises ApiError otherwise."""
        try:
            async with self._session.request(method, self._url + path, json=body, headers=self._headers) as response:
                payload = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ApiError(
                f"{self._url} cannot be reached; is the stack up (`tiebreak up`)? {_cause(error)}"
            ) from error
        try:
            document: dict[str, Any] = msgspec.json.decode(payload) if payload else {}
        except msgspec.DecodeError as error:
            raise ApiError(f"{path}: not JSON ({response.status})", status=response.status) from error
        if response.status >= 300:
            refusal = document.get("error", {})
            message = f"{path}: {response.status} {refusal.get('message', '')}"
            raise ApiError(message, status=response.status, code=refusal.get("code") or "")
        return document, response.headers

    async def models(self) -> list[str]:
        """Names that ``model`` can be now: policies and versions."""
        return [each["id"] for each in (await self.call("GET", "/v1/models"))[0]["data"]]

    async def consent(self, user: str) -> None:
        """The user opts in to pairs."""
        await self.call("PUT", f"/v1/users/{user}/consent", {"pairing": True})

    async def ask(
        self, prompt: str, *, model: str = "chat", user: str = "", pair: str = "never", **body: Any
    ) -> Answer:
        """One answer, or a pair; further OpenAI parameters in ``body``."""
        request = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "preference": {"pair": pair},
            **({"user": user} if user else {}),
            **body,
        }
        document, headers = await self.call("POST", "/v1/chat/completions", request)
        offer = document.get("preference") or {}
        return Answer(
            texts=tuple(choice["message"]["content"] for choice in document["choices"]),
            version=headers.get("x-tiebreak-version", ""),
            pair_id=offer.get("pair_id", ""),
            token=offer.get("token", ""),
        )

    async def click(self, pair: Answer, choice: str, *, source: str = "simulated") -> dict[str, Any]:
        """Give the verdict; the receipt."""
        verdict = {"pair_id": pair.pair_id, "token": pair.token, "choice": choice, "source": source}
        return (await self.call("POST", "/v1/preferences", verdict))[0]

    async def receipt(self, preference_id: str) -> dict[str, Any]:
        """How far a verdict has come."""
        return (await self.call("GET", f"/v1/preferences/{preference_id}"))[0]

    async def releases(self) -> dict[str, Any]:
        """The routing table and the latest changes, newest first."""
        return (await self.call("GET", "/admin/releases"))[0]

    async def order(self, command: str, version: str, *, force: bool = False, reason: str = "") -> dict[str, Any]:
        """``promote`` or ``rollback`` a version; the release controller decides."""
        return (await self.call("POST", f"/admin/releases/{version}/{command}", {"force": force, "reason": reason}))[0]


def _cause(error: Exception) -> str:
    """What the system said, without the client library's words around it."""
    cause = getattr(error, "os_error", None) or error
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
