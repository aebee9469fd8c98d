"""One exception tree: what can go wrong at the front door, as OpenAI-shaped errors.

    RouterError
    ├── InvalidRequest 400 ── UnsupportedParameter        ├── Conflict 409
    ├── Unauthenticated 401 ── InvalidToken               ├── Gone 410
    ├── Forbidden 403 ── ConsentRequired                  ├── TooManyRequests 429
    ├── NotFound 404, MethodNotAllowed 405                ├── UpstreamFailed 502, DeadlineExceeded 504
    ├── RequestTimeout 408, PayloadTooLarge 413           └── Unavailable 503
    └── ClientClosed 499 (nobody reads it)
A docstring is the default message. Messages never echo what the client sent, but for a field's name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import msgspec.inspect

_UNKNOWN_FIELD = re.compile(r"unknown field `(?P<name>[^`]*)`")
_MISSING_FIELD = re.compile(r"missing required field `(?P<name>[^`]*)`")
_PLACE = re.compile(r" - at `(?:key` in `)?(?P<place>.*?)(?:\[\.\.\.\])?`$", re.S)
_INDEX = re.compile(r"\[(?:\d+|\.\.\.)\]")
_SAFE_NAME = re.compile(r"^[A-Za-z0-9_.\[\]-]{1,80}$")


class ErrorDetail(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every error answer, as OpenAI's clients expect it."""

    error: ErrorDetail


class RouterError(Exception):
    """The router could not do this."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(
        self, message: str = "", *, code: str = "", param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message or (self.__doc__ or "").strip())
        self.code = code or type(self).code
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> ErrorBody:
        """What the client reads."""
        return ErrorBody(ErrorDetail(str(self), self.type, self.param, self.code))

    def headers(self) -> dict[str, str]:
        """``Retry-After`` in whole seconds where a later try can succeed."""
        return {} if self.retry_after_s is None else {"Retry-After": str(max(1, round(self.retry_after_s)))}


class InvalidRequest(RouterError):
    """The request is not valid."""

    status, type, code = 400, "invalid_request_error", "invalid_request"


class UnsupportedParameter(InvalidRequest):
    """This field is not supported here: leave it out. It is refused rather than silently ignored."""

    code = "unsupported_parameter"


class Unauthenticated(RouterError):
    """No valid key: send `Authorization: Bearer <key>`."""

    status, type, code = 401, "authentication_error", "invalid_api_key"


class InvalidToken(Unauthenticated):
    """The pair token was not issued by this deployment for this pair."""

    code = "invalid_token"


class Forbidden(RouterError):
    """This key or user may not do this."""

    status, type, code = 403, "permission_error", "forbidden"


class ConsentRequired(Forbidden):
    """The user has not opted in to comparisons: PUT /v1/users/{user}/consent with {"pairing": true} first."""

    code = "consent_required"


class NotFound(RouterError):
    """There is no such thing here."""

    status, type, code = 404, "not_found_error", "not_found"


class MethodNotAllowed(RouterError):
    """This path does not take this method; GET /docs lists what it takes."""

    status, type, code = 405, "invalid_request_error", "method_not_allowed"


class RequestTimeout(RouterError):
    """The request's body did not arrive in time."""

    status, type, code = 408, "timeout_error", "request_timeout"


class Conflict(RouterError):
    """This contradicts what is recorded already."""

    status, type, code = 409, "conflict_error", "conflict"


class Gone(RouterError):
    """It is too late for this."""

    status, type, code = 410, "invalid_request_error", "expired"


class PayloadTooLarge(RouterError):
    """The request body is larger than this deployment accepts."""

    status, type, code = 413, "invalid_request_error", "request_too_large"


class TooManyRequests(RouterError):
    """Too many requests at once for this key: wait as long as Retry-After says."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"


class UpstreamFailed(RouterError):
    """The model's replica failed before it had answered."""

    status, type, code = 502, "server_error", "upstream_failed"


class Unavailable(RouterError):
    """The service cannot take this now: try again as Retry-After says."""

    status, type, code = 503, "service_unavailable_error", "unavailable"


class ClientClosed(RouterError):
    """The client went away before it was answered."""

    status, type, code = 499, "invalid_request_error", "client_closed"


class DeadlineExceeded(RouterError):
    """The answer was not ready within the deadline."""

    status, type, code = 504, "timeout_error", "deadline_exceeded"


def invalid_body(
    error: msgspec.DecodeError, cls: type[msgspec.Struct], neutral_only: frozenset[str] = frozenset()
) -> InvalidRequest:
    """A 400 that names the field and what was expected of a ``cls``, and repeats nothing of the body.

    ``neutral_only`` are fields that are known but unsupported: only their neutral value is accepted.
    """
    text = str(error)
    place = _PLACE.search(text)
    where = place["place"].removeprefix("$").removeprefix(".") if place else ""
    reason = _PLACE.sub("", text)
    if not isinstance(error, msgspec.ValidationError):
        return InvalidRequest("The body is not valid JSON.", code="invalid_json")
    if unknown := _UNKNOWN_FIELD.search(reason):
        return UnsupportedParameter(param=_param(where, unknown["name"]))
    if missing := _MISSING_FIELD.search(reason):
        param = _param(where, missing["name"])
        return InvalidRequest(f"The field {param} is required.", param=param, code="missing_required_parameter")
    if (root := where.split(".")[0].split("[")[0]) in neutral_only:
        return UnsupportedParameter(param=root)
    if where.rsplit(".", 1)[-1] in neutral_only:
        return UnsupportedParameter(param=_param("", where))
    if reason.startswith(("Invalid enum value", "Invalid value")):
        allowed = ", ".join(json.dumps(value) for value in _allowed(cls, where))
        reason = f"This is not one of the supported values{': ' if allowed else ''}{allowed}"
    param = _param("", where)
    return InvalidRequest(f"{reason} (field {param or 'body'}).", param=param, code="invalid_value")


def _allowed(cls: type[msgspec.Struct], where: str) -> list[Any]:
    """The values that the field at ``where`` (``a.b[0].c``) may have; empty where they are not enumerated."""
    types: list[Any] = [msgspec.inspect.type_info(cls)]
    tags: list[Any] = []
    for name in _INDEX.sub("", where).split("."):
        kinds = list(_flat(types))
        tags = [kind.tag for kind in kinds if getattr(kind, "tag_field", None) == name]
        types = [f.type for kind in kinds for f in getattr(kind, "fields", ()) if f.encode_name == name]
    literals = [kind for kind in _flat(types) if isinstance(kind, msgspec.inspect.LiteralType)]
    return list(dict.fromkeys([*tags, *(value for literal in literals for value in literal.values)]))


def _flat(types: Iterable[Any]) -> Iterator[Any]:
    """Unions and arrays taken apart."""
    for kind in types:
        if isinstance(kind, msgspec.inspect.UnionType):
            yield from _flat(kind.types)
        elif inner := getattr(kind, "item_type", None):
            yield from _flat((inner,))
        else:
            yield kind


def _param(where: str, name: str) -> str | None:
    full = f"{where}.{name}" if where else name
    return full if _SAFE_NAME.match(full) else None
