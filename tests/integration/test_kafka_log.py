"""What only Kafka has: partitions, replaced producers, credentials."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
from kafka import KafkaAdminClient  # type: ignore[import-untyped]
from kafka.admin import ConfigResource, ConfigResourceType  # type: ignore[import-untyped]

from deploy.kafka.broker import Broker
from telemetry.config import TelemetryConfig, open_log
from telemetry.event_log import Entry
from telemetry.events import PREFERENCES, VERSIONS
from telemetry.kafka_log import cluster_of


def test_preferences_are_spread_over_partitions_and_versions_stay_in_one(kafka_config: TelemetryConfig) -> None:
    log = open_log(kafka_config)
    futures = [log.append(PREFERENCES, f"pair-{n}", b"x") for n in range(60)]
    positions = [future.result(timeout=20) for future in futures]
    again = log.append(PREFERENCES, "pair-0", b"x").result(timeout=20)
    versions = [log.append(VERSIONS, f"variant-{n}", b"x").result(timeout=20) for n in range(10)]
    log.close()

    assert {position.partition for position in positions} == {0, 1, 2, 3}
    assert again.partition == positions[0].partition
    assert {position.partition for position in versions} == {0}


def test_a_running_reader_reads_partitions_that_were_added(kafka_config: TelemetryConfig, kafka_broker: Broker) -> None:
    config = msgspec.structs.replace(kafka_config, kafka_partitions=1)
    log = open_log(config)
    log.append("grows.v1", "k", b"x").result(timeout=20)
    reader = log.reader(["grows.v1"], {})
    assert len(reader.poll(max_entries=10, timeout_s=5)) == 1

    admin = KafkaAdminClient(bootstrap_servers=kafka_broker.bootstrap)
    admin.create_partitions({config.kafka_topic_prefix + "grows.v1": 8})
    admin.close()
    log.close()
    log = open_log(config)
    for n in range(40):
        log.append("grows.v1", f"key-{n}", b"y").result(timeout=20)

    entries: list[Entry] = []
    deadline = time.monotonic() + 30
    while len(entries) < 40 and time.monotonic() < deadline:
        entries += reader.poll(max_entries=100, timeout_s=0.5)
    reader.close()
    log.close()
    assert sorted(entry.key for entry in entries) == sorted(f"key-{n}" for n in range(40))
    assert len({entry.position.partition for entry in entries}) > 1


def test_certificates_and_credentials_reach_the_client(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("open sesame\n")
    config = TelemetryConfig(
        log="kafka",
        kafka_bootstrap="one:9092, two:9092",
        kafka_security_protocol="SASL_SSL",
        kafka_ssl_cafile="/ca.pem",
        kafka_sasl_mechanism="SCRAM-SHA-512",
        kafka_sasl_username="ali",
        kafka_sasl_password_file=str(password),
    )

    client = cluster_of(config).client

    assert client["bootstrap_servers"] == ["one:9092", "two:9092"]
    assert client["security_protocol"] == "SASL_SSL"
    assert client["ssl_cafile"] == "/ca.pem"
    assert client["sasl_mechanism"] == "SCRAM-SHA-512"
    assert (client["sasl_plain_username"], client["sasl_plain_password"]) == ("ali", "open sesame")


def test_append_returns_at_once_while_no_broker_was_ever_there() -> None:
    log = open_log(TelemetryConfig(log="kafka", kafka_bootstrap="127.0.0.1:1", append_timeout_s=0.5))

    began = time.monotonic()
    futures = [log.append(PREFERENCES, "k", b"x") for _ in range(100)]
    assert time.monotonic() - began < 0.2

    errors = [str(future.exception(timeout=5)) for future in futures]
    assert all("no broker at 127.0.0.1:1" in error for error in errors)
    assert time.monotonic() - began < 3
    log.close()


def test_new_topics_keep_their_entries_as_configured_and_are_never_compacted(
    kafka_config: TelemetryConfig, kafka_broker: Broker
) -> None:
    config = msgspec.structs.replace(kafka_config, kafka_retention_days=3)
    log = open_log(config)
    for topic in (PREFERENCES, VERSIONS):
        log.append(topic, "k", b"x").result(timeout=20)
    log.close()
    found = {topic: settings_of(kafka_broker, config.kafka_topic_prefix + topic) for topic in (PREFERENCES, VERSIONS)}
    assert found[PREFERENCES]["retention.ms"] == str(3 * 86_400_000)
    assert found[VERSIONS]["retention.ms"] == "-1"
    assert {settings["cleanup.policy"] for settings in found.values()} == {"delete"}
    assert cluster_of(msgspec.structs.replace(config, kafka_replication=3)).settings(PREFERENCES)[
        "min.insync.replicas"
    ] == "2"  # fmt: skip


def settings_of(broker: Broker, topic: str) -> dict[str, str]:
    """The topic's configuration as the broker has it."""
    admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap)
    (found,) = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)], config_filter="all").values()
    admin.close()
    return {name: entry["value"] for name, entry in found[topic].items()}
