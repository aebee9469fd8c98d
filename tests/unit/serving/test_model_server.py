"""What a model server's words mean here: refusals, errors within a stream, tokens, the base among its models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from serving import errors
from serving.config import BaseConfig, ServingConfig
from serving.model_server import Choice, Failure, Logprobs, Model, base_model, failed, read_key, reason, refuse
from serving.remote_stream import sampled
from telemetry.configuration import InvalidConfiguration, convert_table


def remote(**changes: Any) -> BaseConfig:
    return BaseConfig(**({"engine": "openai", "url": "http://127.0.0.1:8001", "model": "folder"} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": ""}, "needs url"),
        ({"url": "127.0.0.1:8001"}, "needs url"),
        ({"url": "http://127.0.0.1:8001/v1"}, "no /v1"),
        ({"model": ""}, "needs model"),
        ({"replicas": 2}, "replicas: 1"),
        ({"engine": "echo"}, "url is for"),
    ],
)
def test_a_base_that_cannot_be_served_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    table = {"engine": "openai", "url": "http://127.0.0.1:8001", "model": "folder"} | changes
    with pytest.raises(InvalidConfiguration, match=message):
        convert_table({"bases": {"large": table}}, "serving", ServingConfig, {})


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, b'{"error": {"message": "top_p must be in (0, 1]"}}', errors.InvalidRequest),
        (400, b'{"error": {"message": "maximum context length is 1024 tokens"}}', errors.PromptTooLong),
        (404, b'{"error": {"message": "The model `v1` does not exist."}}', errors.VersionNotReady),
        (404, b'{"detail": "Not Found"}', errors.ServerAway),
        (401, b'{"error": "Unauthorized"}', errors.ServerAway),
        (429, b"slow down", errors.Overloaded),
        (503, b"", errors.Overloaded),
        (500, b"<html>oops</html>", errors.EngineFailed),
    ],
)
def test_a_refusal_becomes_an_error_of_ours(status: int, body: bytes, kind: type[errors.ServingError]) -> None:
    with pytest.raises(errors.ServingError) as caught:
        refuse(status, body)
    assert type(caught.value) is kind


def test_an_error_within_a_stream_means_what_its_code_says() -> None:
    assert type(failed(Failure("bad schema", code=400))) is errors.InvalidRequest
    assert type(failed(Failure("boom"))) is errors.EngineFailed
    assert type(failed(Failure("boom", code="invalid_request_error"))) is errors.EngineFailed


def test_a_reason_is_one_short_line() -> None:
    assert reason(b'{"error": {"message": "two\\nlines"}}') == "two lines"
    assert len(reason(b"x" * 10_000)) <= 500
    assert reason(b'{"success": false, "error_message": "rank"}') == "rank"


def test_tokens_come_with_their_alternatives_likeliest_first() -> None:
    top = [{"token_id:7": -2.0, "token_id:5": -0.5, "token_id:9": -3.0}]
    (token,) = sampled(Choice([7], Logprobs([-2.0], top)), 2)
    assert (token.token_id, token.logprob, token.top) == (7, -2.0, ((5, -0.5), (7, -2.0)))


def test_a_probability_that_is_no_number_is_seen() -> None:
    (token,) = sampled(Choice([7], Logprobs([None])), 0)
    assert not token.is_finite


@pytest.mark.parametrize("choice", [Choice(), Choice([7]), Choice([7, 8], Logprobs([-1.0]))])
def test_tokens_without_ids_or_probabilities_are_no_use(choice: Choice) -> None:
    with pytest.raises(errors.UnsupportedModel, match="token ids"):
        sampled(choice, 0)


def test_the_base_is_the_only_model_without_a_parent_or_the_one_that_was_named() -> None:
    adapter = Model("v000001-00000000", parent="a")
    assert base_model([Model("a"), adapter], remote()).id == "a"
    assert base_model([Model("a"), Model("b")], remote(server_model="b")).id == "b"
    with pytest.raises(errors.ServerAway, match="set server_model to one of: a, b"):
        base_model([Model("a"), Model("b")], remote())
    with pytest.raises(errors.ServerAway, match="no model 'c'"):
        base_model([Model("a")], remote(server_model="c"))


def test_a_key_is_read_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    assert read_key(str(tmp_path / "key")) == "secret"
    with pytest.raises(errors.ServerAway, match="api_key_file"):
        read_key(str(tmp_path / "none"))


def test_a_remote_bases_table_survives_being_written_and_read() -> None:
    assert msgspec.convert(msgspec.to_builtins(remote()), BaseConfig) == remote()
