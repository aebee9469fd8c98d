"""The ``[serving]`` table: which base models run, and how each of their replicas is built. Torch-free."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

import msgspec

from serving.safety import DEFAULT_PATTERNS


class BaseConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[serving.bases.<name>]``: one base model, one deployment."""

    # A prepared transformers folder. `tiebreak up` resolves package:NAME, tiny:SEED and hub names to one.
    model: str = ""
    # Replicas. Each holds the base once, and every wanted version.
    replicas: int = 1
    # "transformers" computes; "openai" forwards to the model server at `url`, which computes; "echo" answers
    # without a model, for tests and router benches.
    engine: Literal["transformers", "echo", "openai"] = "transformers"
    # "auto" (a GPU if there is one), "cpu", "cuda".
    device: str = "auto"
    # "auto" is bfloat16 on a GPU; on a processor float32, with prompts multiplied in bfloat16 where it can do that.
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    # CPU threads of one replica; 0: all cores. They are shared with the trainer.
    threads: int = 0
    # GPUs that Ray gives one replica; 0 runs on the CPU.
    gpus: float = 0.0
    # Adapter slots: versions beside the base. Live versions + 2, or a swap waits for a drain.
    slots: int = 8
    # Largest LoRA rank that fits; slots are allocated for it.
    rank_max: int = 16
    # Tokens of prompt and answer together. Memory of keys and values grows with it.
    max_context: int = 2048
    # Completions computed together; more of them wait.
    max_batch: int = 16
    # Requests that may wait; further ones get 503.
    max_queue: int = 64
    # Finished sequences whose keys and values are kept for prompts that begin alike.
    cache_rows: int = 8
    # Prompt tokens computed in one step beside running answers: more reads prompts faster, less keeps answers smooth.
    # Measured on a GPU with 1024.
    chunk_tokens: int = 32
    # The same when no answer is running. Measured on a GPU with 2048.
    idle_chunk_tokens: int = 256
    # Echo engine only: seconds per token.
    echo_token_s: float = 0.0

    # The rest is for engine = "openai". `model` is needed all the same, the very weights that the server serves:
    # tokenizer, chat template and the base's version come from it, and the trainer trains it. `replicas` stays 1
    # (a server is scaled behind its url); `slots`, `rank_max`, `max_context`, `max_batch` and `max_queue` hold here
    # as everywhere and may be no more than the server was started with; device, threads and cache are the server's.
    # Where the server answers, without /v1, for example http://127.0.0.1:8001.
    url: str = ""
    # Which server it is: both speak OpenAI's API, but load adapters at paths of their own.
    server: Literal["vllm", "sglang"] = "vllm"
    # The base's name there (GET /v1/models); empty: the only one that is no adapter.
    server_model: str = ""
    # Ask for the base as an adapter that changes nothing; it takes one adapter slot of the server. vLLM 0.32 on a CPU
    # computes a base request with another adapter's weights where both are in one batch. GPU kernels tell them
    # apart: false spares the base's answers the adapter's arithmetic there.
    base_as_adapter: bool = True
    # A file with the server's API key; empty: it wants none.
    api_key_file: str = ""
    # The state folder as the server sees it, where that is another path (a mount): it reads adapters from there.
    server_state: str = ""
    # Seconds for a connection; without a byte while answering; for loading an adapter; between two looks at it.
    connect_timeout_s: float = 2.0
    token_timeout_s: float = 60.0
    load_timeout_s: float = 60.0
    look_interval_s: float = 1.0

    def __post_init__(self) -> None:
        if self.engine != "openai":
            if self.url:
                raise ValueError('url is for engine = "openai" only')
            return
        address = urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError('engine = "openai" needs url, for example url = "http://127.0.0.1:8001"')
        if address.path.strip("/") or address.query:
            raise ValueError(f"url: without a path (no /v1): {address.scheme}://{address.netloc}")
        if not self.model:
            raise ValueError('engine = "openai" needs model: the folder of the weights that the server serves')
        if self.replicas != 1:
            raise ValueError('replicas: 1 with engine = "openai"; a server is scaled behind its url')


class ServingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[serving]``."""

    bases: dict[str, BaseConfig]
    # Seconds between two looks of the control loop at replicas and routing table.
    interval_s: float = 0.5
    # Port of the control loop's /metrics on loopback; 0 picks a free one.
    metrics_port: int = 0
    # Regular expressions, case ignored; a completion that matches is stopped and marked unsafe.
    blocked_patterns: tuple[str, ...] = DEFAULT_PATTERNS
    # A running Ray cluster's address; empty starts one for this process alone.
    ray_address: str = ""
    # First port that replicas may listen on; taken ones are passed over.
    first_port: int = 30000
