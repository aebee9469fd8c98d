"""What the local stack consists of: a private Redis and our own processes, as the supervisor starts them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import redis

from deploy import machine
from deploy.config import Deployment, socket_path
from deploy.status import read_ready
from deploy.supervisor import Program
from router.config import worker_name
from telemetry.config import redis_client
from telemetry.metrics import SHARED_FOLDER

MODULES = {
    "serving": "serving",
    "router": "router",
    "recorder": "telemetry.recorder",
    "release": "deploy.release",
    "trainer": "online_trainer",
}
BACKGROUND = {"recorder", "release", "trainer"}  # nobody waits for them
# A step's tensors come from a heap that stays: by default each would be mapped anew, and a fifth of the time would go
# into the kernel's zeroing of pages.
# The recorder's memory comes from three allocators, and each would keep what it once had: an arena a thread, and pages
# for ten seconds. 387 → 276 MB after a million events (DECISIONS.md). _RJEM_: delta-rs's own jemalloc.
GIVES_BACK = {"MALLOC_ARENA_MAX": "1", "_RJEM_MALLOC_CONF": "narenas:1,dirty_decay_ms:0,muzzy_decay_ms:0"}
KEEPS_ITS_HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_TOP_PAD_": str(2**26)}


def programs(deployment: Deployment) -> list[Program]:
    """What the stack consists of, in the order of its start."""
    found = [redis_of(deployment)] if deployment.owns_redis else []
    stack = deployment.stack
    threads = {"serving": stack.serving_threads, "trainer": stack.trainer_threads}
    heaps = {"trainer": KEEPS_ITS_HEAP, "recorder": GIVES_BACK}
    for name, module in MODULES.items():
        environ = _environ(threads.get(name, 1)) | heaps.get(name, {})
        nice = stack.background_nice if name in BACKGROUND else 0
        if name == "router" and deployment.router_workers > 1:
            environ[SHARED_FOLDER] = str(_shared_metrics(deployment))
            for worker in range(1, deployment.router_workers + 1):
                found.append(_ours(deployment, worker_name(worker), module, environ, nice, "--worker", str(worker)))
        else:
            found.append(_ours(deployment, name, module, environ, nice))
    return found


def empty_shared_metrics(deployment: Deployment) -> None:
    """Before the first of the router's workers starts: what an earlier life of the stack counted is over."""
    folder = _shared_metrics(deployment)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _shared_metrics(deployment: Deployment) -> Path:
    """Where the router's workers count for one ``/metrics``."""
    return deployment.run_folder / "router-metrics"


def _ours(
    deployment: Deployment, name: str, module: str, environ: Mapping[str, str], nice: int, *words: str
) -> Program:
    ready = deployment.run_folder / f"{name}.ready"
    return Program(
        name,
        (sys.executable, "-m", module, "--config", str(deployment.config_path), *words),
        is_ready=lambda pid: _announced(ready, pid),
        environ=environ,
        nice=nice,
        before_start=lambda: ready.unlink(missing_ok=True),
    )


def _environ(threads: int) -> dict[str, str]:
    """What every process of ours needs said: where the code is, how many threads, no surprises."""
    root = str(Path(__file__).resolve().parent.parent)
    count = str(min(threads, machine.cores()))
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "RAY_worker_niceness": "0",  # Ray would put a replica behind everything else on the machine
    }


def redis_of(deployment: Deployment) -> Program:
    """The private Redis: a socket, no port, every write on disk before it is acknowledged."""
    socket, data = socket_path(deployment.state), deployment.state / "redis"

    def prepare() -> None:
        data.mkdir(parents=True, exist_ok=True)
        socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        socket.unlink(missing_ok=True)

    options = {
        "port": "0", "unixsocket": str(socket), "unixsocketperm": "700", "dir": str(data), "save": "",
        "appendonly": "yes", "appendfsync": "always", "aof-load-truncated": "yes", "maxmemory-policy": "noeviction",
        "rdbcompression": "no",  # of its file when that is rewritten: sealed texts hardly get shorter
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return Program(
        "redis",
        (machine.redis_program() or "redis-server", *words),
        is_ready=lambda _: _answers(deployment),
        before_start=prepare,
    )


def _answers(deployment: Deployment) -> bool:
    try:
        with redis_client(deployment.telemetry, timeout_s=0.2) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


def _announced(path: Path, pid: int) -> bool:
    info = read_ready(path)
    return info is not None and info.get("pid") == pid
