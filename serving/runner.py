"""The base model with its adapters and its memory: one plan in, the logits it asks for out.

Any causal model that takes its attention from transformers' attention interface works unchanged: linears are
wrapped for adapters and attention is ours. ``check`` compares with transformers' own computation once, so
that a model which needs more (logit caps, attention sinks, recurrent state) is refused, not served wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from serving.errors import UnsupportedModel
from serving.kv import ATTENTION, KvRows, Prompt, StepKv
from serving.lora import LoraStack
from serving.product import pack_head
from serving.scheduler import Plan, Sequence, Work

CHECKED_TOKENS = 24


class Runner:
    """Owns every tensor. ``run`` is called by one thread; adapters are written into idle slots by others.

    ``many_dtype``: what products of many tokens are computed in, if not in ``dtype``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        many_dtype: torch.dtype | None = None,
        device: str,
        slots: int,
        rank_max: int,
        rows: int,
        max_context: int,
    ) -> None:
        self.device = device
        disable_progress_bar()  # type: ignore[no-untyped-call]
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        self.model = model.to(device).eval()
        config = self.model.config.get_text_config()
        self.vocabulary = int(config.vocab_size)
        self.max_context = min(max_context, int(config.max_position_embeddings))
        expected = self._reference_logits()
        self.lora = LoraStack(self.model, slots=slots, rank_max=rank_max, dtype=dtype, many_dtype=many_dtype)
        pack_head(self.model)
        self.model.set_attn_implementation(ATTENTION)
        self.kv = KvRows(
            layers=config.num_hidden_layers,
            rows=rows,
            length=self.max_context,
            heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            dtype=dtype,
            device=device,
        )
        self._check(expected)

    @torch.inference_mode()
    def run(self, plan: Plan, *, keep: int = 1) -> Tensor:
        """Logits [N, V] after each piece of work that asks for them, in the order of ``plan.work``.

        ``keep``: of how many of its last tokens.
        """
        self.kv.copy(plan.copies)
        # sorted by slot, each version's tokens lie together; attention finds its rows by index
        order = sorted(range(len(plan.work)), key=lambda i: plan.work[i].sequence.slot)
        tokens: list[int] = []
        positions: list[int] = []
        places: list[int] = []
        slots: list[int] = []
        firsts = [0] * len(order)
        for i in order:
            sequence, start, stop, _ = plan.work[i]
            firsts[i] = len(tokens)
            tokens += sequence.tokens[start:stop]
            positions += range(start, stop)
            places += range(sequence.row * self.max_context + start, sequence.row * self.max_context + stop)
            slots += [sequence.slot] * (stop - start)
        self.lora.set_segments(slots)
        ends = [firsts[i] + work.stop - work.start for i, work in enumerate(plan.work) if work.is_last]
        last = [at for end in ends for at in range(end - keep, end)]
        output = self.model(
            input_ids=self._tensor(tokens)[None],
            position_ids=self._tensor(positions)[None],
            use_cache=False,
            logits_to_keep=self._tensor(last),
            step_kv=self._step_kv(plan, firsts, self._tensor(places)),
        )
        logits: Tensor = output.logits[0]
        return logits

    def _step_kv(self, plan: Plan, firsts: list[int], places_T: Tensor) -> StepKv:
        at = firsts[: plan.decoding]
        is_dense = at == list(range(len(at)))
        return StepKv(
            kv=self.kv,
            places_T=places_T,
            decoding=plan.decoding,
            decode_at=slice(0, plan.decoding) if is_dense else self._tensor(at),
            lengths=[work.stop for work in plan.work[: plan.decoding]],
            prompts=[
                Prompt(firsts[i], firsts[i] + work.stop - work.start, work.sequence.row, work.start, work.stop)
                for i, work in enumerate(plan.work[plan.decoding :], start=plan.decoding)
            ],
            masks={},
        )

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def _checked_prompt(self) -> list[int]:
        return [(7919 * (i + 1)) % self.vocabulary for i in range(CHECKED_TOKENS)]

    @torch.inference_mode()
    def _reference_logits(self) -> Tensor:
        logits: Tensor = self.model(input_ids=self._tensor(self._checked_prompt())[None], use_cache=False).logits
        return logits[0, -1].float()

    def _check(self, expected: Tensor) -> None:
        """Read a prompt in two stretches, then one token: the same logits as transformers, within rounding."""
        sequence = Sequence("check", 0, self._checked_prompt(), CHECKED_TOKENS, row=0)
        half, last = CHECKED_TOKENS // 2, CHECKED_TOKENS - 1
        self.run(Plan([], [Work(sequence, 0, half, True)], 0))
        self.run(Plan([], [Work(sequence, half, last, True)], 0))
        logits = self.run(Plan([], [Work(sequence, last, last + 1, True)], 1))[0].float()
        error = float((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
        is_exact = self.kv.keys.dtype == torch.float32 and self.lora.many_dtype is None
        if not error < (1e-3 if is_exact else 0.1):
            name = type(self.model).__name__
            raise UnsupportedModel(f"{name}: logits differ from transformers' by {error:.2g} of their range")
