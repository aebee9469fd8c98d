"""One admitted chat request as the outside sees it: its place, its span, its count."""

from __future__ import annotations

from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from router.admission import Admission, Caller
from router.errors import RouterError
from router.exchange import Exchange
from telemetry import metrics, tracing


class Visit:
    """Takes a place, a span and a count on entry; all are given back exactly once. Raises when there is no place."""

    def __init__(self, admission: Admission, caller: Caller, policy: str, traceparent: str | None) -> None:
        admission.enter(caller)
        self._admission = admission
        self._caller = caller
        self._policy = policy
        self._is_over = False
        self.span: Span = tracing.tracer("tiebreak.router").start_span(
            f"chat {policy}",
            context=tracing.from_traceparent(traceparent),
            kind=SpanKind.SERVER,
            attributes={"gen_ai.operation.name": "chat", "gen_ai.provider.name": "tiebreak"},
        )

    def succeed(self, exchange: Exchange) -> None:
        """End with what was answered."""
        usage = exchange.usage()
        self.span.set_attribute("gen_ai.usage.input_tokens", usage.prompt_tokens)
        self.span.set_attribute("gen_ai.usage.output_tokens", usage.completion_tokens)
        self.span.set_attribute("gen_ai.response.finish_reasons", [a.finish_reason for a in exchange.shown])
        failure = next((answer.failure for answer in exchange.shown if answer.failure), None)
        is_answered = any(answer.failure is None for answer in exchange.shown)
        self.end(200 if is_answered or failure is None else failure.status, failure)

    def end(self, status: int, error: BaseException | None) -> None:
        """End, unless it is over already."""
        if self._is_over:
            return
        self._is_over = True
        self._admission.leave(self._caller)
        metrics.REQUESTS.labels(self._policy, str(status)).inc()
        self.span.set_attribute("http.response.status_code", status)
        if error is not None and status >= 500:
            code = error.code if isinstance(error, RouterError) else type(error).__name__
            self.span.set_attribute("error.type", code)
            self.span.set_status(Status(StatusCode.ERROR))
        self.span.end()

    def describe(self, exchange: Exchange) -> None:
        """GenAI attributes (OpenTelemetry semantic conventions); no text, no user."""
        span = self.span
        sampling = exchange.answers[0].sampling
        span.set_attribute("gen_ai.request.model", exchange.policy)
        span.set_attribute("gen_ai.request.max_tokens", sampling.max_tokens)
        span.set_attribute("gen_ai.request.temperature", sampling.temperature)
        span.set_attribute("gen_ai.request.top_p", sampling.top_p)
        span.set_attribute("gen_ai.response.id", exchange.id)
        if exchange.is_pair:
            span.set_attribute("tiebreak.pair_id", exchange.pair_id)
        for name, answer in zip(("a", "b"), exchange.answers, strict=False):
            suffix = f".{name}" if exchange.is_pair else ""
            span.set_attribute(f"tiebreak.variant{suffix}", answer.arm.variant)
            span.set_attribute(f"tiebreak.version{suffix}", answer.arm.version)
        if not exchange.is_pair:
            span.set_attribute("gen_ai.response.model", exchange.answers[0].arm.version)
