"""``POST /v1/chat/completions``: one answer or a pair, streamed or whole.

A request becomes an ``Exchange`` with one or more answers. What kind of answer it is (single, pair, or a pair
that lost a side) is known before the first byte leaves. Versions show in the headers of single answers only.
A client that goes away cancels the generation.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import timedelta
from typing import Final

import msgspec
from opentelemetry.trace import Span
from starlette.requests import Request
from starlette.responses import Response

from router.admission import Admission, Caller
from router.answers import PairOffer
from router.arms import Arms, PairRatios, choose_arms, parse_model
from router.backends import ReplicaPool
from router.consent import ConsentBook, wants_pair
from router.errors import ClientClosed, RouterError, UnsupportedParameter
from router.exchange import Exchange, new_completion_id
from router.generation import Call, Grown, grow, plan_calls
from router.http import EventStream, JsonResponse, gone_away, read_body
from router.ledger import Ledger
from router.pairs import Ticket, pseudonym, sign_ticket
from router.pressure import refuse
from router.reference import References
from router.schema import ChatLimits, ChatRequest, checked, decode
from router.stream import DONE, ChatStream, event
from router.tables import Tables
from router.visit import Visit
from telemetry import metrics, tracing
from telemetry.conversation import needs_tools
from telemetry.events import new_id, utc_now

CLIENT_CLOSED: Final = ClientClosed.status


class ChatSettings(msgspec.Struct, frozen=True):
    """What of the configuration this handler needs."""

    key: bytes
    limits: ChatLimits
    ratios: PairRatios
    pair_ratio: float
    pair_ttl_s: float
    deadline_s: float


class Chat:
    """The handler and what it works with."""

    def __init__(
        self,
        settings: ChatSettings,
        *,
        admission: Admission,
        tables: Tables,
        pool: ReplicaPool,
        book: ConsentBook,
        ledger: Ledger,
        references: References,
        draw: random.Random,
    ) -> None:
        self._settings = settings
        self._admission = admission
        self._tables = tables
        self._pool = pool
        self._book = book
        self._ledger = ledger
        self._references = references
        self._draw = draw

    async def __call__(self, request: Request, caller: Caller) -> Response:
        """Answer one chat request; raises RouterError before anything was sent."""
        self._refuse_unread(caller)
        body = await self._read(request)
        policy = parse_model(body.model)[0]
        label = policy if policy in self._tables.routing.policies else "unknown"
        visit = Visit(self._admission, caller, label, request.headers.get("traceparent"))
        try:
            exchange, calls = await self._plan(body, request.state.request_id, caller, visit.span)
            visit.describe(exchange)
            return await self._answer(request, exchange, calls, visit)
        except BaseException as error:  # re-raised: the place and the span are given back however it ends
            visit.end(error.status if isinstance(error, RouterError) else 500, error)
            raise

    def _refuse_unread(self, caller: Caller) -> None:
        """Where every base is full it does not matter what is asked. It is counted, and has no span."""
        policies = self._tables.routing.policies
        if self._pool.is_full({route.base for routes in policies.values() for route in routes}):
            self._admission.check(caller)
            metrics.REQUESTS.labels(next(iter(policies)) if len(policies) == 1 else "unread", "503").inc()
            refuse()

    async def _read(self, request: Request) -> ChatRequest:
        try:
            return checked(decode(await read_body(request), ChatRequest), self._settings.limits)
        except RouterError as error:
            metrics.REQUESTS.labels("unknown", str(error.status)).inc()
            raise

    async def _plan(
        self, body: ChatRequest, request_id: str, caller: Caller, span: Span
    ) -> tuple[Exchange, list[Call]]:
        settings = self._settings
        policy, pin = parse_model(body.model)
        routes = self._tables.routing.policies.get(policy, ())
        if routes and not pin:  # whatever is drawn, the first variant is in it
            self._pool.refuse_if_full([routes[0].base])
        user = pseudonym(settings.key, body.user or "")
        is_pair = await wants_pair(body, user, self._book, ratio=settings.pair_ratio, draw=self._draw)
        prompt = body.prompt()
        uses_tools = needs_tools(prompt)
        arms = choose_arms(
            self._tables.routing,
            body.model,
            wants_pair=is_pair,
            ratios=settings.ratios,
            has=self._has_with_tools if uses_tools else self._tables.has,
            draw=self._draw,
        )
        if uses_tools:
            self._require_tools(policy, arms)
        self._pool.refuse_if_full(arm.base for arm in arms.sides)
        trace_id, span_id = tracing.ids(span)
        exchange = Exchange(
            request=body,
            request_id=request_id,
            id=new_completion_id(),
            created=int(time.time()),
            policy=policy,
            user=user,
            caller=caller.name,
            prompt=prompt,
            propensity=arms.propensity,
            key_id=self._ledger.private.key_now(user),
            trace_id=trace_id,
            span_id=span_id,
            offer=self._offer(user) if is_pair else None,
        )
        calls = plan_calls(exchange, arms, self._draw, settings.deadline_s, tracing.traceparent(span))
        return exchange, calls

    def _has_with_tools(self, base: str, version: str) -> bool:
        return self._tables.has(base, version) and self._tables.takes_tools(base)

    def _require_tools(self, policy: str, arms: Arms) -> None:
        """Raise UnsupportedParameter if one of ``arms`` is of a base that takes no tools."""
        for base in dict.fromkeys(arm.base for arm in arms.sides):
            if not self._tables.takes_tools(base):
                raise UnsupportedParameter(
                    f"{policy} is answered by the base {base}, which takes no tools here: its chat template has them "
                    "in no form that is read, or a model server computes it. Leave out tools, tool_calls and messages "
                    "of role tool, or ask a policy over a base that takes them.",
                    param="tools",
                )

    def _offer(self, user: str) -> PairOffer:
        pair_id, expires_at = new_id(), utc_now() + timedelta(seconds=self._settings.pair_ttl_s)
        ticket = Ticket(pair_id, user, expires_at.timestamp())
        return PairOffer(pair_id, sign_ticket(self._settings.key, ticket), expires_at)

    async def _answer(self, request: Request, exchange: Exchange, calls: list[Call], visit: Visit) -> Response:
        """Watch for the client's leaving until there is a response; then the response watches for itself."""
        make = self._start_stream if exchange.request.is_stream else self._whole
        work = asyncio.create_task(make(exchange, calls, visit))
        leaving = asyncio.create_task(gone_away(request.receive))
        try:
            await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            raise ClientClosed()
        finally:
            work.cancel()
            leaving.cancel()
            await asyncio.gather(work, leaving, return_exceptions=True)

    async def _whole(self, exchange: Exchange, calls: list[Call], visit: Visit) -> Response:
        try:
            async with aclosing(grow(self._pool, calls)) as growing:
                async for _ in growing:
                    pass
            self._drop_lost_sides(exchange)
            if exchange.is_pair and not await self._remember(exchange):
                exchange.keep_only(exchange.shown[0])
        finally:
            self._close(exchange)
        visit.succeed(exchange)
        return JsonResponse(exchange.completion(), headers=exchange.headers())

    async def _start_stream(self, exchange: Exchange, calls: list[Call], visit: Visit) -> Response:
        """The response, once every side has begun or is lost; raises RouterError when none began."""
        growing = grow(self._pool, calls)
        begun: Grown = []
        try:
            while not exchange.is_decided(time.perf_counter()):
                begun.extend(await anext(growing))
            self._drop_lost_sides(exchange)
        except BaseException:  # re-raised: the calls are closed however it ends
            await growing.aclose()
            self._close(exchange)
            raise

        async def close(is_whole: bool) -> None:
            await growing.aclose()
            self._close(exchange)
            if is_whole:
                visit.succeed(exchange)
            else:
                visit.end(CLIENT_CLOSED, None)

        return EventStream(self._events(exchange, begun, growing), headers=exchange.headers(), on_close=close)

    async def _remember(self, exchange: Exchange) -> bool:
        """Make the whole pair one that can be judged; False when that failed."""
        if not await self._ledger.remember_pair(exchange):
            return False
        self._references.ask(exchange)
        return True

    def _drop_lost_sides(self, exchange: Exchange) -> None:
        """A pair that lost a side goes on as a normal answer; the loss is counted. Raises if nothing is left."""
        if exchange.is_pair:
            for answer in exchange.failed():
                self._ledger.side_lost(answer)
        exchange.drop_lost_sides()

    def _close(self, exchange: Exchange) -> None:
        now_s = time.perf_counter()
        for answer in exchange.answers:
            answer.cancel(now_s)
        self._ledger.close_exchange(exchange)

    async def _events(self, exchange: Exchange, begun: Grown, growing: AsyncGenerator[Grown]) -> AsyncGenerator[bytes]:
        """The stream's bytes. A pair can be judged before its last piece leaves."""
        stream = ChatStream(exchange)
        ready = stream.write(begun)
        async for grown in growing:
            if ready:
                yield ready
            ready = stream.write(grown)
        if exchange.is_pair:
            ready += await self._complete_pair(exchange, stream)
        failed = exchange.failed()
        if failed and len(failed) == len(exchange.shown):
            yield ready + stream.failure() + DONE
            return
        if failed and not exchange.is_pair and (pieces := exchange.failed_pieces()):
            ready += event(exchange.chunk(pieces))
        usage = event(exchange.usage_chunk()) if exchange.request.includes_usage else b""
        yield ready + usage + DONE

    async def _complete_pair(self, exchange: Exchange, stream: ChatStream) -> bytes:
        """All sides are over: the held finishes of a pair that can be judged, or word that it cannot."""
        lost = exchange.failed()
        for answer in lost:
            self._ledger.side_lost(answer)
        if len(lost) == len(exchange.shown):
            return b""
        if not lost and await self._remember(exchange):
            return stream.finish()
        notice = stream.void()
        exchange.keep_only(next(answer for answer in exchange.shown if not answer.failure))
        return notice
