"""Spans that join over processes: in by W3C traceparent or by the ids an event carries, out by OTLP/HTTP.

Ids are always made (events carry them), spans are filled and leave only where an endpoint is configured. The
provider lives in this module, not in OpenTelemetry's process-wide slot, so that libraries and tests are
left alone. No prompt text in attributes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, TraceFlags

Attribute = str | int | float | bool
Attributes = Mapping[str, Attribute]
_TRACEPARENT = re.compile(r"^(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})$")
EXPORT_S = 2.0  # a collector that is away must not hold a process that stops
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)

_provider = TracerProvider(shutdown_on_exit=False, sampler=ALWAYS_OFF)  # until configure(): ids, no export
_tracers: dict[str, trace.Tracer] = {}


def configure(
    service: str,
    *,
    otlp_endpoint: str = "",
    exporter: SpanExporter | None = None,
    flush_interval_s: float = 1.0,
) -> TracerProvider:
    """Make this process's tracers name ``service`` and send their spans to ``otlp_endpoint``.

    ``otlp_endpoint`` is the collector's base (``http://host:4318``); empty means no export. ``exporter``
    takes its place where given. Call ``shutdown()`` on the result to flush before the process ends.
    """
    global _provider
    resource = Resource.create({"service.name": service, "service.namespace": "tiebreak"})
    if exporter is None and otlp_endpoint:
        exporter = OTLPSpanExporter(endpoint=f"{otlp_endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_S)
    provider = TracerProvider(resource=resource, sampler=ALWAYS_OFF if exporter is None else ALWAYS_ON)
    if exporter is not None:
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=int(flush_interval_s * 1000)))
    _provider = provider
    _tracers.clear()
    return provider


def tracer(name: str) -> trace.Tracer:
    """The tracer of module ``name``. Ask after ``configure``, for each use: it is cheap."""
    if name not in _tracers:
        _tracers[name] = _provider.get_tracer(name)
    return _tracers[name]


def parent(trace_id: str, span_id: str) -> Context:
    """A context whose current span is the remote span (32 and 16 hex digits); a root when either is not one."""
    context = _span_context(trace_id, span_id)
    if context is None:
        return Context()
    return trace.set_span_in_context(NonRecordingSpan(context), Context())


def from_traceparent(header: str | None) -> Context:
    """The context of a W3C ``traceparent`` header; a root when it is absent or malformed."""
    match = _TRACEPARENT.match((header or "").strip())
    return parent(match[1], match[2]) if match else Context()


def traceparent(span: Span | None = None) -> str:
    """The W3C header that continues ``span`` (default: the current one); empty when there is none."""
    trace_id, span_id = ids(span)
    return f"00-{trace_id}-{span_id}-01" if trace_id else ""


def ids(span: Span | None = None) -> tuple[str, str]:
    """(trace id, span id) in hex of ``span`` (default: the current one); two empty strings when there is none."""
    context = (trace.get_current_span() if span is None else span).get_span_context()
    if not context.is_valid:
        return "", ""
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


def links(remote: Iterable[tuple[str, str]]) -> list[Link]:
    """Links to remote spans given as (trace id, span id); those that are no ids are left out."""
    contexts = (_span_context(trace_id, span_id) for trace_id, span_id in remote)
    return [Link(context) for context in contexts if context is not None]


@contextmanager
def span(
    name: str,
    *,
    within: Context | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Attributes | None = None,
    linked: Iterable[tuple[str, str]] = (),
) -> Iterator[Span]:
    """A current span around a block; child of ``within``, else of the current span. Exceptions mark it failed."""
    with tracer("tiebreak").start_as_current_span(
        name, context=within, kind=kind, attributes=dict(attributes or {}), links=links(linked)
    ) as started:
        yield started


def record(
    name: str,
    *,
    within: Context,
    started_at: datetime | None = None,
    attributes: Attributes | None = None,
    linked: Iterable[tuple[str, str]] = (),
) -> tuple[str, str]:
    """One finished span from ``started_at`` (default: now) to now, inside another trace; its (trace id, span id)."""
    start_ns = None if started_at is None else int(started_at.timestamp() * 1e9)
    finished = tracer("tiebreak").start_span(
        name, context=within, start_time=start_ns, attributes=dict(attributes or {}), links=links(linked)
    )
    finished.end()
    return ids(finished)


def _span_context(trace_id: str, span_id: str) -> SpanContext | None:
    try:
        context = SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=_SAMPLED)
    except ValueError:
        return None
    return context if context.is_valid and len(trace_id) == 32 and len(span_id) == 16 else None
