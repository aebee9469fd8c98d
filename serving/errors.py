"""What a replica refuses, and how it says so: one small tree, each leaf with its HTTP status and code."""

from __future__ import annotations


class ServingError(Exception):
    """The replica could not do what was asked."""

    status = 500
    code = "internal_error"

    def __init__(self, message: str = "") -> None:
        super().__init__(message or (self.__doc__ or "").strip())


class InvalidRequest(ServingError):
    """The request cannot be served as it stands; mend it before trying again."""

    status = 400
    code = "invalid_request"


class PromptTooLong(InvalidRequest):
    """The prompt leaves no room for an answer in the model's context."""

    code = "context_length_exceeded"


class UnsupportedTools(InvalidRequest):
    """The base's chat template renders no tools in the form that is read here: leave them out, or ask another base."""

    code = "unsupported_parameter"


class VersionNotReady(ServingError):
    """This replica does not hold the version now: ask another, or wait until it is loaded."""

    status = 409
    code = "version_not_ready"


class VersionRefused(ServingError):
    """The version cannot be served here: wrong base, wrong signature, wrong shapes, or not finite."""

    status = 422
    code = "version_refused"


class VersionUnknown(ServingError):
    """No such version in the store or in this replica."""

    status = 404
    code = "version_unknown"


class NoFreeSlot(ServingError):
    """Every adapter slot holds a version; unload one first."""

    status = 409
    code = "no_free_slot"


class Overloaded(ServingError):
    """The replica's queue is full; try another one or come back soon."""

    status = 503
    code = "overloaded"


class EngineClosed(ServingError):
    """The replica is shutting down and takes no new request."""

    status = 503
    code = "shutting_down"


class EngineFailed(ServingError):
    """The engine stopped on an error of its own; the replica must be replaced."""

    code = "engine_failed"


class ServerAway(ServingError):
    """The model server behind this replica does not answer; it is asked again as soon as it does."""

    status = 502
    code = "server_away"


class ServerUnreachable(ServerAway):
    """There is no connection to the model server, or it broke."""


class UnsupportedModel(ServingError):
    """The engine would not compute this model as transformers does; use another base model."""

    code = "unsupported_model"


class ControlPlaneAway(ServingError):
    """Ray Serve's controller does not answer; replicas keep answering where they were last seen."""

    status = 503
    code = "control_plane_away"
