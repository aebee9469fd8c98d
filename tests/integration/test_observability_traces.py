"""OTLP over HTTP into a real receiver: one trace leads from a request to the version that learned from it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from deploy.release import report
from deploy.release.state import Stepped
from telemetry import tracing
from tests.unit.release.story import V1, Story


class Receiver:
    """Takes OTLP/HTTP exports and keeps (service, span)."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = ExportTraceServiceRequest()
                request.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
                assert self.path == "/v1/traces"
                receiver.keep(request)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def keep(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            names = {item.key: item.value.string_value for item in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [(names["service.name"], span) for span in scope.spans]

    def named(self, name: str) -> Span:
        return next(span for _, span in self.spans if span.name == name)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    yield found
    found.close()
    tracing.configure("tests")


def test_one_trace_leads_from_the_request_over_the_verdict_to_the_step_and_the_live_version(
    receiver: Receiver,
) -> None:
    # the router: a request, its pair, and later a verdict that continues the pair's trace
    provider = tracing.configure("router", otlp_endpoint=receiver.url)
    with tracing.span("chat chat"), tracing.span("pair shown"):
        pair = tracing.ids()
    with tracing.span("verdict", within=tracing.parent(*pair)):
        verdict = tracing.ids()
    provider.shutdown()
    # the trainer: a step of its own that links to its verdicts, and a mark in each verdict's trace
    provider = tracing.configure("trainer", otlp_endpoint=receiver.url)
    with tracing.span("train step", linked=[verdict]):
        step = tracing.ids()
        tracing.record("trained", within=tracing.parent(*verdict), linked=[step])
    provider.shutdown()
    # the release controller: what the machine announces is told to every verdict that is now live
    provider = tracing.configure("release", otlp_endpoint=receiver.url)
    story = Story()
    story.take(Stepped((verdict,)))
    story.to_canary(V1)
    for change in story.changes:
        report.report("chat-main", change, story.now_s)
    provider.shutdown()

    joined = [(service, span.name) for service, span in receiver.spans if span.trace_id.hex() == verdict[0]]
    assert sorted(joined) == [
        ("release", "release canary"), ("router", "chat chat"), ("router", "pair shown"), ("router", "verdict"),
        ("trainer", "trained"),
    ]  # fmt: skip
    assert receiver.named("pair shown").parent_span_id == receiver.named("chat chat").span_id
    assert receiver.named("verdict").parent_span_id == receiver.named("pair shown").span_id
    assert receiver.named("release canary").parent_span_id == receiver.named("verdict").span_id
    assert receiver.named("train step").links[0].span_id.hex() == verdict[1]
    versions = {item.key: item.value.string_value for item in receiver.named("release canary").attributes}
    assert versions["tiebreak.version"] == V1


def test_a_request_continues_the_callers_trace(receiver: Receiver) -> None:
    provider = tracing.configure("router", otlp_endpoint=f"{receiver.url}/")
    header = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with tracing.span("chat chat", within=tracing.from_traceparent(header)):
        onward = tracing.traceparent()
    provider.shutdown()
    assert receiver.named("chat chat").parent_span_id.hex() == "b7ad6b7169203331"
    assert onward.startswith("00-0af7651916cd43dd8448eb211c80319c-")
    assert receiver.named("chat chat").span_id.hex() in onward


def test_a_collector_that_is_away_stops_nobody() -> None:
    provider = tracing.configure("router", otlp_endpoint="http://127.0.0.1:9")
    with tracing.span("chat chat"):
        assert tracing.ids()[0]
    tracing.configure("tests")
    provider.shutdown()
