"""The base model with its adapters and its memory: one plan in, the logits it asks for out.

Any causal model that takes its attention from transformers' attention interface works unchanged: linears are
wrapped for adapters and attention is ours. ``check`` compares with transformers' own computation once, so
that a model which needs more (logit caps, attention sinks, recurrent state) is refused, not served wrong.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from serving import decode_ops
from serving.decode_ops import DecodeOps
from serving.errors import UnsupportedModel
from serving.fused import FusedDecoder, ModelDecoder, is_known
from serving.graphs import DecodeGraphs, Made
from serving.kv import ATTENTION, Fresh, KvRows, Prompt, StepKv
from serving.lora import LoraStack
from serving.product import pack_head
from serving.scheduler import Copy, Plan, Sequence, Work

log = logging.getLogger(__name__)
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
        self._is_cuda = torch.device(device).type == "cuda"
        self.is_apart = self._is_cuda  # computes while the processor does something else
        disable_progress_bar()  # type: ignore[no-untyped-call]
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        self.model = model.to(device).eval()
        config = self.model.config.get_text_config()
        self.vocabulary = int(config.vocab_size)
        self.max_context = min(max_context, int(config.max_position_embeddings))
        self._expected = self._reference_logits()
        self.lora = LoraStack(self.model, slots=slots, rank_max=rank_max, dtype=dtype, many_dtype=many_dtype)
        pack_head(self.model)
        self.model.set_attn_implementation(ATTENTION)
        self.kv = KvRows(
            layers=config.num_hidden_layers,
            rows=rows + 1,  # the last one is for lanes without a sequence
            length=self.max_context,
            heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            dtype=dtype,
            device=device,
        )
        self._graphs: DecodeGraphs | None = None
        self._failures: tuple[type[Exception], ...] = ()  # of its decoder
        self._reads_fresh = self._is_cuda and dtype != torch.float32
        try:
            self._check()
        except (RuntimeError, UnsupportedModel):  # flash attention does not take every head size
            if not self._reads_fresh:
                raise
            self._reads_fresh = False
            self._check()

    def replay_decoding(self, max_batch: int) -> None:
        """From now on compute steps that only decode in fixed shapes: on a GPU their launches are replayed.

        Of the ways to compute a step, the quickest is taken that says what transformers says.
        """
        scratch = (self.kv.keys.shape[1] - 1) * self.max_context
        for kind, ops in self._ways():
            decoder = kind(self.model, self.kv, self.lora, ops)
            graphs = DecodeGraphs(
                decoder, max_batch=max_batch, max_context=self.max_context, scratch=scratch, device=self.device
            )
            failures: tuple[type[Exception], ...] = (UnsupportedModel, *ops.FAILURES)
            extra = {"action": "decoding_replayed", "decoder": kind.__name__, "ops": getattr(ops, "__name__", "")}
            try:
                self._check(graphs)
                with torch.inference_mode():
                    graphs.prepare()
            except failures:  # of a compiler or a capture; what is not replayed is launched
                log.warning("decoding cannot be replayed", exc_info=True, extra=extra | {"action": "decoding_launched"})
            else:
                self._graphs, self._failures = graphs, ops.FAILURES
                log.info("decoding is replayed", extra=extra)
                return

    def _ways(self) -> list[tuple[type[FusedDecoder] | type[ModelDecoder], DecodeOps]]:
        """How a step of fixed shapes can be computed, the quickest first."""
        fused: list[type[FusedDecoder]] = [FusedDecoder] if is_known(self.model, self.kv.keys.shape[-1]) else []
        if not self._is_cuda:
            return [(kind, decode_ops) for kind in (*fused, ModelDecoder)]
        from serving import decode_kernels  # needs Triton, which PyTorch brings where it is for CUDA

        return [*((kind, decode_kernels) for kind in (*fused, ModelDecoder)), (ModelDecoder, decode_ops)]

    @torch.inference_mode()
    def step(self, plan: Plan) -> Made:
        """As ``run``, by replaying where that is possible; with their summary where the step computes it."""
        if self._graphs is not None and plan.decoding == len(plan.work):
            self.kv.copy(plan.copies)
            plan = plan._replace(copies=[])
            try:
                return self._graphs.run(plan)
            except self._failures:  # of a graph that is made now, for longer rows: its steps are launched instead
                log.warning("decoding cannot be replayed", exc_info=True, extra={"action": "decoding_launched"})
                self._graphs = None
        return Made(self.run(plan), None)

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
            fresh=self._fresh(plan, firsts) if self._reads_fresh else None,
        )

    def _fresh(self, plan: Plan, firsts: list[int]) -> Fresh | None:
        """How to read the prompts of a step at once, where none of them has a beginning in its row already."""
        if any(work.start for work in plan.work[plan.decoding :]):
            return None
        ends = [0, *sorted(first + work.stop - work.start for first, work in zip(firsts, plan.work, strict=True))]
        longest = max(work.stop - work.start for work in plan.work)
        return Fresh(self._tensor(ends).to(torch.int32), longest)

    def _tensor(self, values: list[int]) -> Tensor:
        tensor = torch.tensor(values, dtype=torch.long, pin_memory=self._is_cuda)
        return tensor.to(self.device, non_blocking=True) if self._is_cuda else tensor

    def _checked_prompt(self) -> list[int]:
        return [(7919 * (i + 1)) % self.vocabulary for i in range(CHECKED_TOKENS)]

    @torch.inference_mode()
    def _reference_logits(self) -> Tensor:
        logits: Tensor = self.model(input_ids=self._tensor(self._checked_prompt())[None], use_cache=False).logits
        return logits[0, -1].float()

    @torch.inference_mode()
    def _check(self, graphs: DecodeGraphs | None = None) -> None:
        """Read a prompt in two stretches, then one token: the same logits as transformers, within rounding.

        By ``graphs``, where they are given. Raises UnsupportedModel.
        """
        sequence = Sequence("check", 0, self._checked_prompt(), CHECKED_TOKENS, row=0)
        half, last = CHECKED_TOKENS // 2, CHECKED_TOKENS - 1
        self.run(Plan([], [Work(sequence, 0, half, True)], 0))
        self.run(Plan([], [Work(sequence, half, last, True)], 0))
        expected, plan = self._expected, Plan([], [Work(sequence, last, last + 1, True)], 1)
        try:
            logits = (graphs.run(plan).logits if graphs else self.run(plan))[0].float()
        finally:  # what is refused here may have left what is no number
            self.kv.copy([Copy(0, 0, CHECKED_TOKENS, clears=True)])
        error = float((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
        is_exact = self.kv.keys.dtype == torch.float32 and self.lora.many_dtype is None
        if not error < (1e-3 if is_exact else 0.1):
            name = type(self.model).__name__
            raise UnsupportedModel(f"{name}: logits differ from transformers' by {error:.2g} of their range")
