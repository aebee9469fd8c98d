"""One replica put together from its configuration, without Ray: engine, identity, ASGI app."""

from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette

from serving.config import BaseConfig
from serving.echo_engine import EchoEngine
from serving.engine import Engine
from serving.http import ReplicaInfo, build_app
from serving.safety import OutputFilter
from telemetry.manifest import base_digest
from telemetry.process import signing_key


def build_replica(
    base: str, config: BaseConfig, *, state: Path, replica_id: str, blocked_patterns: tuple[str, ...]
) -> tuple[Engine, Starlette]:
    """The engine and the app that starts it; torch is imported only for an engine that reads weights."""
    output_filter = OutputFilter(blocked_patterns)
    digest = base_digest(Path(config.model)) if config.model else ""
    engine: Engine
    if config.engine == "echo":
        engine = EchoEngine(
            digest,
            slots=config.slots,
            max_context=config.max_context,
            token_s=config.echo_token_s,
            output_filter=output_filter,
        )
    elif config.engine == "openai":
        from serving.remote_engine import RemoteEngine

        engine = RemoteEngine(digest, base, config, output_filter, state=state)
    else:
        from serving.transformers_engine import TransformersEngine

        engine = TransformersEngine(Path(config.model), digest, base, config, output_filter)
    info = ReplicaInfo(replica_id, base, digest, state, signing_key(state))
    return engine, build_app(engine, info)
