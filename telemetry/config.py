"""The shared ``[telemetry]`` table: where state lies, which event log and which Redis, and how to reach them.

Every process reads it and gets its clients here, so that time-outs and retries are the same everywhere.
Redis clients never retry by themselves: redis-py's default of ten tries turns a frozen server into seconds of
silence. Callers that can wait retry; callers that answer people do not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from telemetry.event_log import EventLog
from telemetry.people import PersonKeys, has_keys, load_provider
from telemetry.sealing import Sealer

SecurityProtocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]


class TelemetryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[telemetry]``. Every process of a deployment reads the same table."""

    # Folder that holds everything this deployment writes. `~` is expanded.
    state: str = "~/.local/share/tiebreak"
    # Preference store: a folder or an object store's URL. Empty: `store` in `state`.
    store: str = ""
    # Encrypt every person's texts with a key of their own, so that a person can be forgotten (telemetry/people.py).
    # Never turn it off where people were promised that: what was sealed stays readable, what comes is not sealed.
    encryption: bool = True
    # What wraps these keys: "module:factory" of a telemetry.people.KeyProvider. Empty: a master key in `state`.
    key_provider: str = ""
    # Redis for shared state and, with log = "redis", the event log. Empty: the private server's socket in `state`.
    redis_url: str = ""
    # Seconds one Redis call may take before it fails. The disk's fsync is inside it.
    redis_timeout_s: float = 1.0
    # Event log: "redis" (embedded, Redis Streams) or "kafka".
    log: Literal["redis", "kafka"] = "redis"
    # Seconds an append may wait for a log that does not answer, before it fails with LogUnavailable.
    append_timeout_s: float = 1.0

    # Kafka: host:port, several parted by commas.
    kafka_bootstrap: str = "127.0.0.1:9092"
    # Partitions of newly made topics (versions, dead letters and audit always have one: their order is global).
    kafka_partitions: int = 4
    # Days that newly made topics keep their entries (versions and audit are kept for ever): longer than the recorder or
    # the trainer may ever be away, for what is gone before they read it halts them. Topics that are there keep theirs.
    kafka_retention_days: Annotated[int, msgspec.Meta(ge=1)] = 30
    # Copies of newly made topics: 3 in production; all but one of them must have an entry before it is acknowledged.
    kafka_replication: int = 1
    # Put before every topic's name, so that deployments can share a cluster.
    kafka_topic_prefix: str = ""
    kafka_security_protocol: SecurityProtocol = "PLAINTEXT"
    # TLS: certificate authority, and the client's certificate and key (PEM files).
    kafka_ssl_cafile: str = ""
    kafka_ssl_certfile: str = ""
    kafka_ssl_keyfile: str = ""
    # SASL: PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512; the password lies alone in a file.
    kafka_sasl_mechanism: str = ""
    kafka_sasl_username: str = ""
    kafka_sasl_password_file: str = ""

    # Recorder: a batch is stored after this many entries or seconds, whichever is first. A commit costs some 20 ms
    # however many it holds, so that a backlog wants large ones.
    recorder_batch_entries: int = 5000
    recorder_flush_s: float = 2.0
    # Port of the recorder's /metrics on loopback; 0 picks a free one.
    recorder_metrics_port: int = 0

    # OTLP/HTTP endpoint of a collector, e.g. http://127.0.0.1:4318; empty: traces are not sent.
    otlp_endpoint: str = ""

    @property
    def state_path(self) -> Path:
        """``state`` as an absolute path."""
        return Path(self.state).expanduser().absolute()

    @property
    def store_root(self) -> str:
        """``store``, or its folder in ``state``."""
        return self.store or str(self.state_path / "store")

    @property
    def redis_address(self) -> str:
        """``redis_url``, or the private server's socket."""
        return self.redis_url or f"unix://{self.state_path / 'run' / 'redis.sock'}?db=0"


def redis_client(config: TelemetryConfig, *, timeout_s: float | None = None) -> redis.Redis:
    """A blocking client that fails after ``timeout_s`` (default: the configured one) and never retries."""
    timeout_s = config.redis_timeout_s if timeout_s is None else timeout_s
    return redis.Redis.from_url(
        config.redis_address,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
    )


def redis_client_async(config: TelemetryConfig, *, timeout_s: float | None = None) -> redis.asyncio.Redis:
    """``redis_client`` for asyncio; close it with ``aclose``."""
    timeout_s = config.redis_timeout_s if timeout_s is None else timeout_s
    return redis.asyncio.Redis.from_url(
        config.redis_address,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=AsyncRetry(NoBackoff(), 0),
    )


def open_sealer(config: TelemetryConfig) -> Sealer:
    """What seals and opens people's texts in this deployment."""
    state = config.state_path
    if not (config.encryption or has_keys(state)):
        return Sealer(None)
    return Sealer(PersonKeys(state, load_provider(config.key_provider, state)), is_sealing=config.encryption)


def open_log(config: TelemetryConfig) -> EventLog:
    """The deployment's event log; connects on first use, so that it may be away right now."""
    if config.log == "kafka":
        from telemetry.kafka_log import kafka_log  # kafka-python is loaded only where it is used

        return kafka_log(config)
    from telemetry.redis_log import RedisLog

    return RedisLog(lambda timeout_s: redis_client(config, timeout_s=timeout_s), config.append_timeout_s)
