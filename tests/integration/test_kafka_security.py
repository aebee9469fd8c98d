"""The log over TLS with a password, on a real broker that takes nothing else."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from msgspec.structs import replace

from deploy.kafka.broker import Broker, KafkaNotInstallable
from telemetry.config import TelemetryConfig, open_log
from telemetry.event_log import LogUnavailable
from telemetry.events import PREFERENCES

PASSWORD = "open sesame"
JAAS = "org.apache.kafka.common.security.scram.ScramLoginModule required"


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed one for 127.0.0.1: what clients trust, and with its key what the broker shows."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")]), datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    ).public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    trusted, shown = folder / "ca.pem", folder / "server.pem"
    trusted.write_bytes(made)
    shown.write_bytes(private + made)
    return trusted, shown


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Broker, Path]]:
    """A broker with one listener, SASL_SSL, and one user, ali; and the certificate to trust."""
    folder = tmp_path_factory.mktemp("secure")
    trusted, shown = certificate(folder)
    broker = Broker(
        folder / "kafka",
        protocol="SASL_SSL",
        settings={
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": shown,
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": trusted,
            "sasl.enabled.mechanisms": "SCRAM-SHA-512",
            "sasl.mechanism.inter.broker.protocol": "SCRAM-SHA-512",
            "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": f'{JAAS} username="ali" password="{PASSWORD}";',
        },
        formatting=("--add-scram", f"SCRAM-SHA-512=[name=ali,password={PASSWORD}]"),
    )
    try:
        broker.start()
    except KafkaNotInstallable as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"the Kafka tier is missing: {error}")
        pytest.skip(f"the Kafka tier is missing: {error}")
    yield broker, trusted
    broker.kill()
    gc.collect()


@pytest.fixture
def config(telemetry_config: TelemetryConfig, secure: tuple[Broker, Path], tmp_path: Path) -> TelemetryConfig:
    broker, trusted = secure
    password = tmp_path / "password"
    password.write_text(PASSWORD + "\n")
    return replace(
        telemetry_config,
        log="kafka",
        kafka_bootstrap=broker.bootstrap,
        kafka_security_protocol="SASL_SSL",
        kafka_ssl_cafile=str(trusted),
        kafka_sasl_mechanism="SCRAM-SHA-512",
        kafka_sasl_username="ali",
        kafka_sasl_password_file=str(password),
    )


def test_entries_go_and_come_over_tls_with_a_password(config: TelemetryConfig) -> None:
    log = open_log(config)
    at = log.append(PREFERENCES, "pair", b"verdict").result(20)
    reader = log.reader((PREFERENCES,), {})
    entries = [entry for _ in range(40) for entry in reader.poll(max_entries=10, timeout_s=0.25)]
    reader.close()
    log.close()
    assert [(entry.position, entry.payload) for entry in entries] == [(at, b"verdict")]


def test_a_wrong_password_is_a_log_that_cannot_be_had(config: TelemetryConfig) -> None:
    Path(config.kafka_sasl_password_file).write_text("wrong")
    log = open_log(replace(config, append_timeout_s=2.0))
    with pytest.raises(LogUnavailable):
        log.append(PREFERENCES, "pair", b"verdict").result(20)
    log.close()


def test_a_broker_that_the_authority_did_not_sign_gets_nothing(config: TelemetryConfig, tmp_path: Path) -> None:
    stranger, _ = certificate(tmp_path)
    log = open_log(replace(config, kafka_ssl_cafile=str(stranger), append_timeout_s=2.0))
    with pytest.raises(LogUnavailable):
        log.append(PREFERENCES, "pair", b"verdict").result(20)
    log.close()
