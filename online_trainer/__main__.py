"""``python -m online_trainer --config run/config.toml``: the trainer as a process."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import IO

import torch

from online_trainer.config import TrainerConfig
from online_trainer.errors import TrainerError, TrainerInUse
from online_trainer.parallel import start
from online_trainer.policy import load_policy
from online_trainer.publish import VersionStore
from online_trainer.tracking import open_tracker
from online_trainer.trainer import Trainer
from telemetry import logs, metrics, tracing
from telemetry.config import TelemetryConfig, open_log, open_sealer
from telemetry.configuration import InvalidConfiguration, read_table
from telemetry.event_log import PositionLost
from telemetry.manifest import base_digest
from telemetry.people import KeysAway, KeyUnusable
from telemetry.process import HeldByAnother, announce_ready, hold, signing_key

log = logging.getLogger("online_trainer")
STOPPING = (InvalidConfiguration, TrainerError, FileNotFoundError, PositionLost, KeyUnusable, KeysAway)


def main(arguments: list[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; 0 on a graceful stop, 1 where the message says what to mend."""
    parser = argparse.ArgumentParser(prog="python -m online_trainer", description="Preferences in, versions out.")
    parser.add_argument("--config", type=Path, required=True, help="the resolved configuration (TOML)")
    path = parser.parse_args(arguments).config
    logs.configure("trainer")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        serve(read_table(path, "telemetry", TelemetryConfig), read_table(path, "trainer", TrainerConfig), stop)
    except STOPPING as error:
        log.error("%s", error, extra={"action": "trainer_stopped"})
        return 1
    return 0


def serve(telemetry: TelemetryConfig, config: TrainerConfig, stop: threading.Event) -> None:
    """Build the trainer from the configuration and run it."""
    if not config.model:
        raise InvalidConfiguration("[trainer]: model is missing: the folder of the base model")
    torch.manual_seed(config.seed)
    provider = tracing.configure("trainer", otlp_endpoint=telemetry.otlp_endpoint)
    state, event_log = telemetry.state_path, open_log(telemetry)
    folder = state / "trainer" / config.variant
    with closing(start(config)) as helpers, own(folder):  # helpers first: they load while this process does
        policy, tracker = load_policy(config), open_tracker(config, state / "trainer")
        trainer = Trainer(
            config,
            policy,
            event_log,
            VersionStore(state / "versions", config, signing_key(state)),
            folder=folder,
            base_digest=base_digest(Path(config.model)),
            sealer=open_sealer(telemetry),
            tracker=tracker,
            helpers=helpers,
        )
        url = f"http://127.0.0.1:{metrics.expose(config.metrics_port)}/metrics"
        try:
            trainer.run(stop, lambda: announce_ready(state, "trainer", metrics_url=url))
        finally:
            tracker.close()
            event_log.close()
            provider.shutdown()


def own(folder: Path) -> IO[str]:
    """The folder's lock, held until it is closed. Raises TrainerInUse."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return hold(folder / "lock")
    except HeldByAnother as error:
        raise TrainerInUse(
            f"another trainer (pid {error.pid}) learns on {folder}: stop it, or give this one another variant or state"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
