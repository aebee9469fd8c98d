"""Routes and lifespan of the front door. What a route does is elsewhere; here stands which routes there are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import version
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST
from redis.exceptions import RedisError
from starlette.applications import Starlette
from starlette.convertors import Convertor, register_url_convertor
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Route

from router import docs
from router.admin import Command, HeldVersions, Order, Releases, checked_version, held_versions
from router.admission import OPEN_CALLER, Caller
from router.answers import (
    ChatChunk,
    ChatCompletion,
    ConsentState,
    FeedbackReceipt,
    Health,
    Model,
    ModelList,
    Receipt,
    Timeline,
)
from router.assets import page
from router.config import RouterConfig
from router.erasure import Erasure
from router.errors import NotFound, Unavailable
from router.feedback import record_feedback
from router.http import EXCEPTION_HANDLERS, Edge, JsonResponse, read_body
from router.models import find_model, list_models
from router.openapi import Endpoint, Header, document
from router.pairs import pseudonym
from router.schema import ChatRequest, Consent, FeedbackRequest, ReleaseOrder, VerdictRequest, decode
from router.services import Services, keys_of, open_services
from telemetry.config import TelemetryConfig
from telemetry.manifest import VERSION_PATTERN
from telemetry.metrics import page as page_of_metrics


class _Erasable(Convertor[str]):
    """A user in a path, slashes and all, but not the consent of one."""

    regex = "(?!.*/consent$).+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("erasable", _Erasable())
OpenServices = Callable[[], AbstractAsyncContextManager[Services]]


def services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


async def chat(request: Request, caller: Caller) -> Response:
    return await services(request).chat(request, caller)


async def record_preference(request: Request, caller: Caller) -> Response:
    body = decode(await read_body(request), VerdictRequest)
    receipt = await services(request).preferences.record(body, caller)
    return JsonResponse(receipt, 200 if receipt.replayed else 201)


async def read_preference(request: Request, caller: Caller) -> Response:
    return JsonResponse(await services(request).receipts.read(request.path_params["id"], caller))


async def retract_preference(request: Request, caller: Caller) -> Response:
    return JsonResponse(await services(request).receipts.retract(request.path_params["id"], caller))


async def give_feedback(request: Request, caller: Caller) -> Response:
    body = decode(await read_body(request), FeedbackRequest)
    here = services(request)
    return JsonResponse(await record_feedback(body, caller, key=here.key, ledger=here.ledger), 201)


async def read_consent(request: Request, caller: Caller) -> Response:
    here = services(request)
    try:
        return JsonResponse(await here.book.read(pseudonym(here.key, request.path_params["user"])))
    except (RedisError, OSError) as error:
        raise _consent_unavailable() from error


async def write_consent(request: Request, caller: Caller) -> Response:
    body = decode(await read_body(request), Consent)
    here = services(request)
    user = pseudonym(here.key, request.path_params["user"])
    try:
        await here.ledger.audit(caller, "consent_changed", user, pairing=str(body.pairing).lower())
        return JsonResponse(await here.book.write(user, body.pairing))
    except (RedisError, OSError) as error:
        raise _consent_unavailable() from error


async def erase_user(request: Request, caller: Caller) -> Response:
    here = services(request)
    return JsonResponse(await here.eraser.erase(pseudonym(here.key, request.path_params["user"]), caller))


def _consent_unavailable() -> Unavailable:
    message = "Consent cannot be read or written now."
    return Unavailable(message, code="state_unavailable", retry_after_s=1.0)


async def unsupported(request: Request, caller: Caller) -> Response:
    message = f"{request.url.path} is not served here: chat models answer POST /v1/chat/completions."
    raise NotFound(message, code="unsupported_endpoint")


async def models(request: Request, caller: Caller) -> Response:
    here = services(request)
    return JsonResponse(list_models(here.tables.routing, here.started_at))


async def model(request: Request, caller: Caller) -> Response:
    here = services(request)
    return JsonResponse(find_model(here.tables.routing, here.started_at, request.path_params["id"]))


async def live(request: Request, caller: Caller) -> Response:
    return JsonResponse(Health("live"))


async def ready(request: Request, caller: Caller) -> Response:
    here = services(request)
    missing = here.tables.missing()
    try:
        await here.redis.ping()
    except (RedisError, OSError):
        missing += ("Redis",)
    return JsonResponse(Health("not_ready" if missing else "ready", missing), 503 if missing else 200)


async def metrics(request: Request, caller: Caller) -> Response:
    return Response(page_of_metrics(), media_type=CONTENT_TYPE_LATEST)


async def releases(request: Request, caller: Caller) -> Response:
    here = services(request)
    return JsonResponse(await here.releases.read(here.tables.routing))


async def versions(request: Request, caller: Caller) -> Response:
    here = services(request)
    return JsonResponse(held_versions(here.tables.routing, here.tables.replicas))


async def promote(request: Request, caller: Caller) -> Response:
    return await _order(request, caller, "promote")


async def rollback(request: Request, caller: Caller) -> Response:
    return await _order(request, caller, "rollback")


async def _order(request: Request, caller: Caller, command: Command) -> Response:
    body = await read_body(request)
    order = decode(body, ReleaseOrder) if body else ReleaseOrder()
    here, version = services(request), checked_version(request.path_params["version"])
    await here.ledger.audit(caller, f"{command}_ordered", version, reason=order.reason, force=str(order.force).lower())
    return JsonResponse(await here.releases.order(command, version, order, caller.name), 202)


async def openapi(request: Request, caller: Caller) -> Response:
    return JsonResponse(request.app.state.openapi)


async def docs_page(request: Request, caller: Caller) -> Response:
    return HTMLResponse(docs.PAGE)


async def index(request: Request, caller: Caller) -> Response:
    return page("index.html")


async def asset(request: Request, caller: Caller) -> Response:
    return page(request.path_params["name"])


_REQUEST_ID: Final = Header("X-Request-ID", "Names the request in logs; made here when absent.")
_TRACE: Final = Header("traceparent", "W3C trace context to continue.")
_ANSWER_HEADERS: Final = (
    Header("x-tiebreak-variant", "Variant of a single answer."),
    Header("x-tiebreak-version", "Version of a single answer."),
    Header("x-tiebreak-pair-id", "The pair, when two answers are shown."),
    Header("x-tiebreak-pair-token", "What a verdict on the pair needs."),
)
UNSERVED: Final = ("/v1/completions", "/v1/embeddings", "/v1/responses")  # clients ask for them; the 404 says what is

ENDPOINTS: Final = (
    Endpoint(
        method="POST", path="/v1/chat/completions", handler=chat, role="inference", body=ChatRequest,
        summary="Answer a chat, once or as a pair to choose from; streamed or whole.",
        answers={200: ChatCompletion}, streams=ChatChunk, errors=(404, 429, 502, 503, 504),
        headers_in=(_REQUEST_ID, _TRACE), headers_out=_ANSWER_HEADERS,
    ),
    *(
        Endpoint(
            method="POST", path=path, handler=unsupported, role="inference", answers={}, errors=(404,),
            summary="Not served; the error says what is.",
        )
        for path in UNSERVED
    ),
    Endpoint(
        method="POST", path="/v1/preferences", handler=record_preference, role="inference", body=VerdictRequest,
        summary="Give the verdict on a pair. The same again is answered 200 with the same receipt.",
        answers={201: Receipt, 200: Receipt}, errors=(404, 409, 410, 503),
    ),
    Endpoint(
        method="GET", path="/v1/preferences/{id}", handler=read_preference, role="inference",
        summary="Follow a verdict: accepted, stored, trained, live, dropped or retracted.",
        answers={200: Timeline}, errors=(404, 503),
    ),
    Endpoint(
        method="DELETE", path="/v1/preferences/{id}", handler=retract_preference, role="inference",
        summary="Take a verdict back.", answers={200: Timeline}, errors=(404, 503),
    ),
    Endpoint(
        method="POST", path="/v1/feedback", handler=give_feedback, role="inference", body=FeedbackRequest,
        summary="Give a thumb on a single answer.", answers={201: FeedbackReceipt}, errors=(404, 503),
    ),
    Endpoint(
        method="GET", path="/v1/users/{user:path}/consent", handler=read_consent, role="inference",
        summary="Whether a user has opted in to pairs.", answers={200: ConsentState}, errors=(503,),
    ),
    Endpoint(
        method="PUT", path="/v1/users/{user:path}/consent", handler=write_consent, role="inference", body=Consent,
        summary="Opt a user in to pairs, or out.", answers={200: ConsentState}, errors=(503,),
    ),
    Endpoint(
        method="DELETE", path="/v1/users/{user:erasable}", handler=erase_user, role="admin",
        summary="Forget a user: no text of theirs can be read any more. Names the versions that learned from them.",
        answers={200: Erasure}, errors=(409, 503),
    ),
    Endpoint(
        method="GET", path="/v1/models", handler=models, role="inference",
        summary="Policies, and what can be pinned: policy@channel, policy@variant, policy@version.",
        answers={200: ModelList},
    ),
    Endpoint(
        method="GET", path="/v1/models/{id:path}", handler=model, role="inference",
        summary="One model.", answers={200: Model}, errors=(404,),
    ),
    Endpoint(
        method="GET", path="/admin/releases", handler=releases, role="admin",
        summary="What is where, and the latest changes.", answers={200: Releases}, errors=(503,),
    ),
    Endpoint(
        method="GET", path="/admin/versions", handler=versions, role="admin",
        summary="What each replica holds, loads and drains, its free slots, and what is in flight.",
        answers={200: HeldVersions},
    ),
    Endpoint(
        method="POST", path="/admin/releases/{version}/promote", handler=promote, role="admin", body=ReleaseOrder,
        is_body_required=False, patterns={"version": VERSION_PATTERN.pattern},
        summary="Ask the release controller to promote a version.",
        answers={202: Order}, errors=(503,),
    ),
    Endpoint(
        method="POST", path="/admin/releases/{version}/rollback", handler=rollback, role="admin", body=ReleaseOrder,
        is_body_required=False, patterns={"version": VERSION_PATTERN.pattern},
        summary="Ask the release controller to roll a version back.",
        answers={202: Order}, errors=(503,),
    ),
    Endpoint(
        method="GET", path="/health/live", handler=live, summary="Whether the process runs.", answers={200: Health}
    ),
    Endpoint(
        method="GET", path="/health/ready", handler=ready, summary="Whether requests can be answered.",
        answers={200: Health, 503: Health},
    ),
    Endpoint(
        method="GET", path="/metrics", handler=metrics, summary="Prometheus metrics.", answers={200: None},
        media_type="text/plain",
    ),
    Endpoint(
        method="GET", path="/openapi.json", handler=openapi, summary="This document.", answers={200: dict},
    ),
    Endpoint(
        method="GET", path="/docs", handler=docs_page, summary="This document as a page.", answers={200: None},
        media_type="text/html",
    ),
    Endpoint(
        method="GET", path="/", handler=index, summary="The chat page.", answers={200: None}, errors=(404,),
        media_type="text/html",
    ),
    Endpoint(
        method="GET", path="/pages/{name}", handler=asset, summary="A file of the chat page.", answers={200: None},
        errors=(404,), media_type="*/*",
    ),
)  # fmt: skip


def _route(endpoint: Endpoint) -> BaseRoute:
    async def guarded(request: Request) -> Response:
        caller = OPEN_CALLER
        if endpoint.role is not None:
            admission = services(request).admission
            caller = admission.authenticate(request.headers.get("authorization"), endpoint.role)
        return await endpoint.handler(request, caller)

    return Route(endpoint.path, guarded, methods=[endpoint.method], include_in_schema=False)


def build_app(
    config: RouterConfig, telemetry: TelemetryConfig, *, worker: int = 1, opening: OpenServices | None = None
) -> Starlette:
    """The application of one worker; ``opening`` takes the place of the services that ``config`` describes."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with opening() if opening else open_services(config, telemetry, worker=worker) as opened:
            app.state.services = opened
            yield

    routes = [_route(endpoint) for endpoint in ENDPOINTS]
    middleware = [Middleware(Edge, is_open=not keys_of(config))]
    app = Starlette(routes=routes, lifespan=lifespan, middleware=middleware, exception_handlers=EXCEPTION_HANDLERS)
    app.state.max_body_bytes = config.max_body_bytes
    app.state.body_s = config.body_s
    app.state.openapi = document(ENDPOINTS, title="Tiebreak", version=version("tiebreak"))
    return app
