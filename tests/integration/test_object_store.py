"""The store on an object store that speaks S3 (moto's server): rows, offsets, one writer, data sets, joined files."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import boto3
import pytest
from deltalake import DeltaTable
from msgspec.structs import replace

from deploy.kafka.broker import free_port
from telemetry import store as stores
from telemetry.config import TelemetryConfig
from telemetry.datasets import Datasets, Filter
from telemetry.event_log import Entry, Position
from telemetry.events import PREFERENCES, AnyEvent, encode, key_of
from telemetry.store import Recorded, Store, StoreContended, preferences
from tests import examples

BUCKET = "tiebreak"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Where moto answers."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 0.5).close()
            break
        except OSError:
            time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()


@pytest.fixture
def root(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A bucket's folder of this test's own, reached as delta-rs is told by the environment."""
    environment = {
        "AWS_ENDPOINT_URL": server,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3", endpoint_url=server, region_name="us-east-1").create_bucket(Bucket=BUCKET)
    return TelemetryConfig(store=f"s3://{BUCKET}/{request.node.name}").store_root


def put(store: Store, *events: AnyEvent) -> None:
    """Each event in a commit of its own."""
    for event in events:
        at = store.tables[PREFERENCES].next_offsets().get(0, 0)
        entry = Entry(Position(PREFERENCES, 0, at), key_of(event), encode(event))
        store.append([Recorded(entry, event)], {PREFERENCES: {0: at + 1}})


def test_rows_and_offsets_are_there_for_the_next_process(root: str) -> None:
    put(Store(root), *(examples.preference(n) for n in range(3)))
    again = Store(root)
    assert again.tables[PREFERENCES].next_offsets() == {0: 3}
    put(again, examples.preference(3))
    assert sorted(row["pair_id"] for row in preferences(root)) == [f"pair-{n}" for n in range(4)]


def test_of_two_writers_one_is_refused(root: str) -> None:
    first, second = Store(root), Store(root)
    put(first, examples.preference(1))
    with pytest.raises(StoreContended):
        put(second, examples.preference(2))
    assert [row["pair_id"] for row in preferences(root)] == ["pair-1"]


def test_a_data_set_outlives_joined_and_deleted_files(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "KEEP_OLD_FILES_H", 0)
    store, datasets = Store(root), Datasets(root)
    put(store, *(replace(examples.preference(n), event_id=f"preference-{n}") for n in range(3)))
    made = datasets.create(Filter(), by="test")
    put(store, *(replace(examples.preference(n), event_id=f"preference-{n}") for n in range(3, 6)))
    store.tables[PREFERENCES].compact()
    assert len(DeltaTable(f"{root}/preferences").file_uris()) == 1
    assert datasets.ids(datasets.named(made.id)) == {"preference-0", "preference-1", "preference-2"}
