"""The replica pool: picks a replica that holds the version, streams from it, retries before the first token only.

Of two random candidates the one with less in flight answers, unless another has read the prompt's beginning for this
version and is not much busier. A replica that refuses or breaks is left out of the next try; one that says 409 or takes
no connection is left out until the replica table has been written anew, or for ``STALE_S``. How much a base is given at
once is found by router/pressure.py. Tokens come straight from the replica's own listener over kept-alive connections.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

import msgspec

from router.affinity import PrefixMemory, prefix_keys
from router.direct import Connection, ConnectionBroken, DirectClient, Unreachable
from router.errors import (
    DeadlineExceeded,
    InvalidRequest,
    RouterError,
    Unavailable,
    UnsupportedParameter,
    UpstreamFailed,
)
from router.pressure import ConcurrencyLimit, refuse
from router.tables import Tables
from serving.wire import GATHER_HEADER, Chunk, GenerateRequest, ScoreRequest, Scores
from telemetry.metrics import CONCURRENCY_LIMIT, RESPONSE_ERRORS
from telemetry.routing import Replica

log = logging.getLogger(__name__)
TRIES = 2
CONNECT_S = 2.0
STALE_S = 2.0
TELL_EVERY_S = 1.0
IMBALANCE = 4  # requests that the reader of a prompt's prefix may have in flight beyond another replica's
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Chunk)
_scores = msgspec.json.Decoder(Scores)


class _TryAnother(Exception):
    """This replica cannot answer now; nothing was generated. ``error`` is what the client hears if none can."""

    def __init__(self, error: RouterError, *, is_stale: bool = False) -> None:
        super().__init__(str(error))
        self.error = error
        self.is_stale = is_stale


class RetryBudget:
    """How many requests may be asked again: a tenth of all, so that a fleet in trouble gets no second wave.

    ``reserve`` retries are there from the start and the most that can be saved up (a token bucket, as gRPC's retry
    throttling): enough for all that wait at a replica that dies.
    """

    def __init__(self, ratio: float = 0.1, reserve: float = 64.0) -> None:
        self._ratio = ratio
        self._reserve = reserve
        self._left = reserve

    def earn(self) -> None:
        """A request came."""
        self._left = min(self._reserve, self._left + self._ratio)

    def spend(self) -> bool:
        """Whether one more may be asked again; if so, it is paid for."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class ReplicaPool:
    """Every replica of every base, as the tables name them."""

    def __init__(
        self, tables: Tables, *, ready_wait_s: float, min_in_flight: float, max_in_flight: float, patience_s: float
    ) -> None:
        self._tables = tables
        self._limit_range, self._patience_s = (min_in_flight, max_in_flight), patience_s
        self._limits: dict[str, ConcurrencyLimit] = {}  # by base
        self._ready_wait_s = ready_wait_s
        self._in_flight: Counter[str] = Counter()
        self._budget = RetryBudget()
        self._told_at_s = 0.0
        self._prefixes = PrefixMemory()
        # (replica, version) → age of the table that was wrong, and when that was found
        self._stale: dict[tuple[str, str], tuple[float, float]] = {}
        self._client = DirectClient("/v1/generate", connect_s=CONNECT_S)
        self._scoring = DirectClient("/v1/score", connect_s=CONNECT_S)

    def close(self) -> None:
        """Close every connection."""
        self._client.close()
        self._scoring.close()

    def is_full(self, bases: Iterable[str]) -> bool:
        """Whether none of ``bases``, of which there is at least one, would take one more request."""
        limits = [self._limit(base) for base in bases]
        return bool(limits) and all(limit.is_full for limit in limits)

    def refuse_if_full(self, bases: Iterable[str]) -> None:
        """Raise Unavailable when none of ``bases`` would take one more request: before any work was put into it."""
        if self.is_full(bases):
            refuse()

    async def generate(
        self, base: str, request: GenerateRequest, *, is_read_along: bool = True
    ) -> AsyncGenerator[list[Chunk]]:
        """Chunks as they arrive, several at a time; the first is retried once elsewhere, later ones never.

        A replica that cannot have begun (no connection, no such version) is passed over for nothing; a retry after a
        refusal or a broken connection is paid from the budget. What the base cannot take is refused at once. Raises a
        RouterError. Closing the generator cancels.
        """
        limit, tried = self._limit(base), set[str]()
        self._budget.earn()
        for attempt in range(TRIES):
            replica = await self._pick(base, request, tried)
            limit.enter()
            has_begun, asked_s = False, time.perf_counter()
            self._in_flight[replica.replica_id] += 1
            try:
                async with aclosing(self._stream(replica, request, is_read_along)) as stream:
                    async for chunks in stream:
                        if not has_begun:
                            limit.first_token(time.perf_counter() - asked_s)
                            CONCURRENCY_LIMIT.labels(base).set(limit.limit)
                            has_begun = True
                        yield chunks
                return
            except _TryAnother as failure:
                tried.add(replica.replica_id)
                if failure.is_stale:
                    mark = (self._tables.replicas.updated_at_s, time.monotonic())
                    self._stale[replica.replica_id, request.version] = mark
                may_retry = not has_begun and attempt < TRIES - 1
                if not (may_retry and (failure.is_stale or self._budget.spend())):
                    raise failure.error from failure
                await self._tables.refresh()
            finally:
                limit.leave()
                self._leave(replica.replica_id)

    async def score(self, replica: Replica, request: ScoreRequest) -> Scores:
        """What ``replica`` says of given answers when it is idle. Raises a RouterError; nothing is tried twice."""
        try:
            connection = await self._scoring.connect(replica.url)
        except Unreachable as error:
            raise _unreachable() from error
        try:
            connection.ask(b"", _encoder.encode(request), request.deadline_s + CONNECT_S)
            if (status := await connection.status()) != 200:
                raise Unavailable(f"The replica answered {status}.", code="not_scored")
            return _scores.decode(await _rest(connection))
        except TimeoutError as error:
            raise DeadlineExceeded() from error
        except ConnectionBroken as error:
            raise _broken() from error
        except msgspec.DecodeError as error:
            raise UpstreamFailed() from error
        finally:
            connection.let_go()

    def _limit(self, base: str) -> ConcurrencyLimit:
        if base not in self._limits:
            self._limits[base] = ConcurrencyLimit(*self._limit_range, patience_s=self._patience_s)
            CONCURRENCY_LIMIT.labels(base).set(self._limits[base].limit)
        return self._limits[base]

    def _leave(self, replica_id: str) -> None:
        self._in_flight[replica_id] -= 1
        if not self._in_flight[replica_id]:
            del self._in_flight[replica_id]

    async def _pick(self, base: str, request: GenerateRequest, tried: set[str]) -> Replica:
        version = request.version
        deadline = time.monotonic() + self._ready_wait_s
        while True:
            candidates = [r for r in self._tables.holding(base, version) if not self._is_stale(r, version)]
            fresh = [replica for replica in candidates if replica.replica_id not in tried]
            if chosen := fresh or candidates:
                return self._best(chosen, request)
            if not await self._tables.changed(deadline - time.monotonic()):
                self._tell_missing(base, version)
                message = "No replica holds this version now; it is being loaded or is gone."
                raise Unavailable(message, code="no_replica", retry_after_s=2.0)

    def _tell_missing(self, base: str, version: str) -> None:
        table = self._tables.replicas
        if time.monotonic() - self._told_at_s < TELL_EVERY_S:
            return
        self._told_at_s = time.monotonic()
        known = {replica.replica_id: (replica.is_ready, replica.versions) for replica in table.replicas}
        log.warning(
            "no replica of %s holds %s: known %s, table %.1f s old, left out %s",
            base, version, known, time.time() - table.updated_at_s, sorted(self._stale),
            extra={"action": "no_replica", "base": base, "version": version},
        )  # fmt: skip

    def _is_stale(self, replica: Replica, version: str) -> bool:
        mark = self._stale.get((replica.replica_id, version))
        if mark is None:
            return False
        table_at_s, found_s = mark
        if table_at_s == self._tables.replicas.updated_at_s and time.monotonic() - found_s < STALE_S:
            return True
        del self._stale[replica.replica_id, version]
        return False

    def _best(self, candidates: list[Replica], request: GenerateRequest) -> Replica:
        """The reader of the longest prefix, unless it is much busier than the choice without that knowledge."""
        if len(candidates) == 1:
            return candidates[0]
        choice = self._less_loaded(candidates)
        keys = prefix_keys(request.version, request.messages)
        by_id = {replica.replica_id: replica for replica in candidates}
        most = self._in_flight[choice.replica_id] + IMBALANCE
        for reader in self._prefixes.readers(keys):
            if reader in by_id and self._in_flight[reader] <= most:
                choice = by_id[reader]
                break
        self._prefixes.note(keys, choice.replica_id)
        return choice

    def _less_loaded(self, candidates: list[Replica]) -> Replica:
        two = candidates if len(candidates) <= 2 else random.sample(candidates, 2)
        return min(two, key=lambda r: (self._in_flight[r.replica_id], r.in_flight, random.random()))

    async def _stream(
        self, replica: Replica, request: GenerateRequest, is_read_along: bool
    ) -> AsyncGenerator[list[Chunk]]:
        """Whole NDJSON lines of each network read, decoded. Leaving early cuts the connection, which cancels."""
        try:
            connection = await self._client.connect(replica.url)
        except Unreachable as error:
            raise _TryAnother(_unreachable(), is_stale=True) from error
        try:
            connection.ask(_headers(request, is_read_along), _encoder.encode(request), request.deadline_s)
            if (status := await connection.status()) != 200:
                raise _refused(status, await _rest(connection))
            rest = b""
            while data := await connection.read():
                *lines, rest = (rest + data).split(b"\n")
                if chunks := [_decoder.decode(line) for line in lines if line]:
                    _check_version(chunks, request.version)
                    yield chunks
            if rest:
                yield [_decoder.decode(rest)]
        except TimeoutError as error:
            raise DeadlineExceeded() from error
        except ConnectionBroken as error:
            raise _TryAnother(_broken()) from error
        except msgspec.DecodeError as error:
            raise UpstreamFailed("The replica's answer cannot be read.") from error
        finally:
            connection.let_go()


def _headers(request: GenerateRequest, is_read_along: bool) -> bytes:
    """Whole lines. All values are made by this router."""
    trace = f"traceparent: {request.traceparent}\r\n" if request.traceparent else ""
    gather = "" if is_read_along else f"{GATHER_HEADER}: 1\r\n"
    return f"X-Request-ID: {request.request_id}\r\n{trace}{gather}".encode()


async def _rest(connection: Connection) -> bytes:
    body = b""
    while data := await connection.read():
        body += data
    return body


def _check_version(chunks: list[Chunk], version: str) -> None:
    for chunk in chunks:
        if chunk.version != version:
            RESPONSE_ERRORS.labels("", version, "version_mismatch").inc()
            raise UpstreamFailed("The replica answered with another version.", code="version_mismatch")


def _unreachable() -> RouterError:
    return Unavailable("The replica takes no connection.", code="no_replica", retry_after_s=2.0)


def _broken() -> RouterError:
    return UpstreamFailed("The connection to the replica broke.")


def _refused(status: int, body: bytes) -> Exception:
    """What a replica's error answer means here."""
    if status == 409:
        error: RouterError = Unavailable("This version is not ready.", code="version_not_ready", retry_after_s=1.0)
        return _TryAnother(error, is_stale=True)
    if status in (429, 503):
        return _TryAnother(Unavailable("Every replica is full.", code="overloaded", retry_after_s=1.0))
    if status in (400, 413, 422):
        return _invalid(body)
    if status == 504:
        return DeadlineExceeded()
    return _TryAnother(UpstreamFailed())


class _ReplicaError(msgspec.Struct):
    code: str = "invalid_request"
    message: str = ""


class _ReplicaErrorBody(msgspec.Struct):
    error: _ReplicaError | str = ""


def _invalid(body: bytes) -> RouterError:
    try:
        error = msgspec.json.decode(body, type=_ReplicaErrorBody).error
    except msgspec.DecodeError:
        return InvalidRequest("The model cannot take this request.")
    if isinstance(error, str):
        return InvalidRequest("The model cannot take this request.", code=error)
    param = "tools" if error.code == UnsupportedParameter.code else None
    return InvalidRequest(error.message, code=error.code, param=param)
