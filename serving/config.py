"""The ``[serving]`` table: which base models run, and how each of their replicas is built. Torch-free."""

from __future__ import annotations

from typing import Literal

import msgspec

from serving.safety import DEFAULT_PATTERNS


class BaseConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[serving.bases.<name>]``: one base model, one deployment."""

    # A prepared transformers folder. `tiebreak up` resolves package:NAME, tiny:SEED and hub names to one.
    model: str = ""
    # Replicas. Each holds the base once, and every wanted version.
    replicas: int = 1
    # "transformers" computes; "echo" answers without a model, for tests and router benches.
    engine: Literal["transformers", "echo"] = "transformers"
    # "auto" (a GPU if there is one), "cpu", "cuda".
    device: str = "auto"
    # "auto" is bfloat16 where the hardware multiplies it, else float32.
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
    chunk_tokens: int = 64
    # The same when no answer is running.
    idle_chunk_tokens: int = 256
    # Echo engine only: seconds per token.
    echo_token_s: float = 0.0


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
