"""Ask one version the probe prompts through the router, as a client would, and turn its answers into numbers.

A router or replica that cannot answer now says nothing about the version: no result, and the probe is asked
again. Probes are pinned to a version, never paired, and marked by a header.
"""

from __future__ import annotations

import json
import logging
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import msgspec

from deploy.release.evidence import Observation, glued_ratio, strange_ratio
from deploy.release.state import Probed, Window
from telemetry.text import repetition_ratio

log = logging.getLogger(__name__)

PROBE_HEADER = "x-tiebreak-probe"
NOT_THE_VERSION = (400, 401, 403, 404, 408, 409, 429, 503)  # the request, the key, the load: ask again
RETRY_S = 0.5


class ProbeUnavailable(RuntimeError):
    """The router did not let the probe through to the version."""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What to ask, and of whom."""

    policy: str
    variant: str
    version: str
    temperature: float
    top_p: float


class Prober:
    """Asks in the background; one question per version at a time."""

    def __init__(
        self, router_url: str, prompts: tuple[str, ...], *, tokens: int, timeout_s: float, api_key: str = ""
    ) -> None:
        self._url = f"{router_url.rstrip('/')}/v1/chat/completions"
        self._prompts = prompts
        self._tokens = tokens
        self._timeout_s = timeout_s
        self._headers = {"content-type": "application/json", PROBE_HEADER: "release"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._rounds = ThreadPoolExecutor(max_workers=4, thread_name_prefix="probe-round")
        self._pool = ThreadPoolExecutor(max_workers=2 * len(prompts), thread_name_prefix="probe")
        self._asked: set[tuple[str, str]] = set()
        self._answered: SimpleQueue[tuple[Question, Window]] = SimpleQueue()

    def ask(self, question: Question) -> None:
        """Start, unless the same version of the same variant is being asked already."""
        key = (question.variant, question.version)
        if key not in self._asked:
            self._asked.add(key)
            self._rounds.submit(self._round, question)

    def results(self) -> list[tuple[str, Probed]]:
        """(variant, result) of questions answered since the last call."""
        found = []
        while not self._answered.empty():
            question, window = self._answered.get()
            self._asked.discard((question.variant, question.version))
            if window:
                found.append((question.variant, Probed(question.version, window)))
        return found

    def close(self) -> None:
        self._rounds.shutdown(wait=False, cancel_futures=True)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _round(self, question: Question) -> None:
        """All prompts at once; an empty window where the version could not be asked."""
        window: Window = ()
        try:
            numbers = range(len(self._prompts))
            window = tuple(self._pool.map(lambda number: self._answer(question, number), numbers))
        except ProbeUnavailable as error:
            extra = {"action": "probe_unavailable", "version": question.version}
            log.warning("a probe got no answer: %s", error, extra=extra)
            time.sleep(RETRY_S)
        finally:
            self._answered.put((question, window))

    def _answer(self, question: Question, index: int) -> Observation:
        body = {
            "model": f"{question.policy}@{question.version}",
            "messages": [{"role": "user", "content": self._prompts[index]}],
            "max_tokens": self._tokens,
            "temperature": question.temperature,
            "top_p": question.top_p,
            "logprobs": True,
            "preference": {"pair": "never"},
        }
        request = urllib.request.Request(self._url, json.dumps(body).encode(), self._headers)
        started = time.monotonic()
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                if error.code in NOT_THE_VERSION:
                    raise ProbeUnavailable(f"{error.code}: {error.read(300).decode(errors='replace')}") from error
            return Observation(at_s=time.time(), is_error=True)
        except (OSError, ValueError) as error:
            raise ProbeUnavailable(f"{self._url}: {error}") from error
        return observation_of(answer, time.monotonic() - started)


def observation_of(answer: dict[str, Any], duration_s: float) -> Observation:
    """One chat completion (OpenAI's JSON) in numbers."""
    choice = answer["choices"][0]
    text = choice["message"]["content"] or ""
    tokens = int(answer["usage"]["completion_tokens"])
    told = (choice.get("logprobs") or {}).get("content") or ()
    logps = [float(token["logprob"]) for token in told]
    return Observation(
        at_s=time.time(),
        is_unsafe=choice["finish_reason"] == "content_filter",
        tpot_s=duration_s / max(1, tokens),
        tokens=tokens if text.strip() else 0,
        repetition_ratio=repetition_ratio(text),
        surprise=-sum(logps) / len(logps) if logps else 0.0,
        strange_ratio=strange_ratio(text),
        glued_ratio=glued_ratio([str(token["token"]) for token in told]),
    )
