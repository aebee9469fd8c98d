"""Trace ids: always there, joined by header or by what an event carries, never taken from nonsense."""

from __future__ import annotations

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from telemetry import tracing

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_ids_exist_without_any_configuration() -> None:
    with tracing.span("work"):
        trace_id, span_id = tracing.ids()
    assert (len(trace_id), len(span_id)) == (32, 16)
    assert tracing.ids() == ("", "")


def test_spans_are_filled_only_where_they_are_exported() -> None:
    tracing.configure("tests")
    with tracing.span("work") as span:
        assert not span.is_recording()
        assert span.get_span_context().is_valid
    provider = tracing.configure("tests", exporter=InMemorySpanExporter())
    with tracing.span("work") as span:
        assert span.is_recording()
    provider.shutdown()
    tracing.configure("tests")


def test_a_span_continues_the_ids_of_an_event() -> None:
    with tracing.span("work", within=tracing.parent(TRACE, SPAN)):
        assert tracing.ids()[0] == TRACE
        assert tracing.traceparent() == f"00-{TRACE}-{tracing.ids()[1]}-01"


@pytest.mark.parametrize(
    "header",
    [None, "", "nonsense", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f"ff-{TRACE}-{SPAN}-01",
     f"00-{TRACE.upper()}-{SPAN}-01", f"00-{TRACE}-{SPAN}"],
)  # fmt: skip
def test_a_malformed_header_begins_a_new_trace(header: str | None) -> None:
    with tracing.span("work", within=tracing.from_traceparent(header)):
        assert tracing.ids()[0] not in ("", TRACE, "0" * 32)


def test_an_event_without_ids_begins_a_new_trace_even_inside_another() -> None:
    with tracing.span("outer"):
        outer = tracing.ids()[0]
        with tracing.span("inner", within=tracing.parent("", "")):
            assert tracing.ids()[0] != outer


def test_links_leave_out_what_is_no_id() -> None:
    assert len(tracing.links([(TRACE, SPAN), ("", ""), ("xyz", SPAN)])) == 1


def test_the_process_wide_provider_is_left_alone() -> None:
    before = trace.get_tracer_provider()
    tracing.configure("tests")
    assert trace.get_tracer_provider() is before


def test_an_exception_passes_through_a_span() -> None:
    with pytest.raises(KeyError), tracing.span("work"):
        raise KeyError("gone")
