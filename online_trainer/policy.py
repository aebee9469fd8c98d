"""The policy that learns and the reference it is held to: one frozen base, small adapters switched on or off.

Only the topmost layers carry adapters. What the layers below make of a pair never changes, so it is computed
once per pair (``encode``) and kept; a step runs the top alone. Adapters are fp32 whatever the base is.
B pairs, T tokens, D width, M predicted tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from online_trainer.batches import PairTokens, Rows, Tokenizer, pack, pack_flat
from online_trainer.config import TrainerConfig
from online_trainer.errors import IncompatibleAdapter
from online_trainer.head import token_logps
from online_trainer.objective import PairLogps
from online_trainer.segments import Segments, takes_segments, use_segments


class Switch:
    """Whether adapters count."""

    is_on = True


class LoraLinear(nn.Module):
    """y = W x + scaling · B A x (arXiv 2106.09685), A and B in fp32, B starting at zero."""

    def __init__(self, base: nn.Linear, rank: int, scaling: float, switch: Switch) -> None:
        super().__init__()
        self.base, self.scaling, self.switch = base, scaling, switch
        place = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=place))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=place))

    def forward(self, x: Tensor) -> Tensor:
        if self.switch.is_on and x.is_cuda:  # float32 products would cost more there than the base's own, in bfloat16
            return in_base_type(self.base, x, self.lora_A, self.lora_B, self.scaling)
        y: Tensor = self.base(x)
        if not self.switch.is_on:
            return y
        low = linear(x.to(self.lora_A.dtype), self.lora_A)
        return y + (linear(low, self.lora_B) * self.scaling).to(y.dtype)


class _InBaseType(torch.autograd.Function):
    """An adapted linear whose products add up in place; the base's weights have no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float
    ) -> Tensor:
        low_TR = x_TI @ a_RI.T
        y_TO = linear(x_TI, weight_OI, bias_O).addmm_(low_TR, b_OR.T, alpha=scaling)
        ctx.save_for_backward(x_TI, weight_OI, a_RI, b_OR, low_TR)
        ctx.scaling = scaling
        return y_TO

    @staticmethod
    def backward(ctx: Any, pull_TO: Tensor) -> tuple[Tensor, None, None, Tensor, Tensor, None]:
        x_TI, weight_OI, a_RI, b_OR, low_TR = ctx.saved_tensors
        pull_TR = (pull_TO @ b_OR).mul_(ctx.scaling)
        pull_TI = (pull_TO @ weight_OI).addmm_(pull_TR, a_RI)
        return pull_TI, None, None, pull_TR.T @ x_TI, (pull_TO.T @ low_TR).mul_(ctx.scaling), None


def in_base_type(base: nn.Linear, x: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
    """y = W x + scaling · B A x, all of it in x's type."""
    y_TO: Tensor = _InBaseType.apply(
        x.flatten(0, -2), base.weight, base.bias, a_RI.to(x.dtype), b_OR.to(x.dtype), scaling
    )
    return y_TO.view(*x.shape[:-1], -1)


class Encoded(NamedTuple):
    """A pair with what does not change while the policy learns."""

    tokens: PairTokens
    hidden_TD: Tensor  # into the lowest trained layer
    reference_chosen: float
    reference_rejected: float


class Scored(NamedTuple):
    """What losses are made of, for B pairs."""

    policy: PairLogps  # sums of log-probs; carry gradients
    lengths: PairLogps  # tokens, those of LD-DPO by their weights
    alignment: PairLogps  # see objective.on_policy_weights


class Policy:
    """A causal language model with adapters on its topmost layers."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        rank: int,
        alpha: float,
        layers: int,
        targets: Sequence[str],
        seed: int,
        ld_alpha: float = 1.0,
        is_flat: bool | None = None,
    ) -> None:
        """``is_flat``: all pairs of a batch in one row (the default on a GPU) or each in its own, padded."""
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.rank, self.alpha, self.targets, self.ld_alpha = rank, alpha, tuple(targets), ld_alpha
        self._decoder: Any = model.get_decoder()  # type: ignore[operator]
        self._head: Any = model.get_output_embeddings()  # type: ignore[operator]
        self._layers: nn.ModuleList = self._decoder.layers
        self._first = max(0, len(self._layers) - (layers or len(self._layers)))
        self._switch, self._seed = Switch(), seed
        self._pack = pack
        if takes_segments(model) if is_flat is None else is_flat:
            use_segments(model)
            self._pack = pack_flat
        self.adapters = self._attach()
        self._anchor: dict[str, Tensor] | None = None  # the reference's adapter; None: the base itself
        self.reset()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _attach(self) -> dict[str, LoraLinear]:
        trained = {id(m) for layer in self._layers[self._first :] for m in layer.modules()}
        adapters: dict[str, LoraLinear] = {}
        for name, module in list(self.model.named_modules()):
            parent, _, child = name.rpartition(".")
            if id(module) in trained and child in self.targets and isinstance(module, nn.Linear):
                adapters[name] = LoraLinear(module, self.rank, self.alpha / self.rank, self._switch)
                setattr(self.model.get_submodule(parent), child, adapters[name])
        if not adapters:
            raise ValueError(f"none of the targets {self.targets} is a linear of the topmost layers")
        return adapters

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in a fixed order."""
        return [p for adapter in self.adapters.values() for p in (adapter.lora_A, adapter.lora_B)]

    def reset(self) -> None:
        """Back to the base: B zero, A as at the start."""
        generator = torch.Generator().manual_seed(self._seed)
        with torch.no_grad():
            for adapter in self.adapters.values():
                bound = 1 / math.sqrt(adapter.base.in_features)
                adapter.lora_A.copy_(torch.empty(adapter.lora_A.shape).uniform_(-bound, bound, generator=generator))
                adapter.lora_B.zero_()

    def shrink(self, factor: float) -> None:
        """Multiply what was learned by ``factor``: the same direction, closer to the base."""
        with torch.no_grad():
            for adapter in self.adapters.values():
                adapter.lora_B.mul_(factor)

    def tensors(self) -> dict[str, Tensor]:
        """The adapter by the names of the version store."""
        return {
            f"{name}.{part}.weight": getattr(adapter, part).detach().cpu().contiguous()
            for name, adapter in self.adapters.items()
            for part in ("lora_A", "lora_B")
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over an adapter's values; raises IncompatibleAdapter, and then changes nothing."""
        self._check_fit(tensors)
        with torch.no_grad():
            for name, adapter in self.adapters.items():
                adapter.lora_A.copy_(tensors[f"{name}.lora_A.weight"])
                adapter.lora_B.copy_(tensors[f"{name}.lora_B.weight"])

    def _check_fit(self, tensors: Mapping[str, Tensor]) -> None:
        own, given = (
            {(name, tuple(tensor.shape)) for name, tensor in each.items()} for each in (self.tensors(), tensors)
        )
        if odd := sorted(own ^ given)[:3]:
            raise IncompatibleAdapter(f"the adapter differs from this policy in {odd}")

    @property
    def anchor(self) -> dict[str, Tensor] | None:
        """The adapter that preferences are measured against; None where that is the base itself."""
        return self._anchor

    def anchor_at(self, tensors: Mapping[str, Tensor] | None) -> None:
        """Measure preferences against this adapter from now on, or against the base; raises IncompatibleAdapter."""
        if tensors is not None:
            self._check_fit(tensors)
        self._anchor = None if tensors is None else {name: tensor.clone() for name, tensor in tensors.items()}

    def anchor_follows(self, decay: float) -> None:
        """Move the anchor by 1 − ``decay`` of the way to the weights as they are: their exponential moving average."""
        own = self.tensors()
        before = self._anchor or {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in own.items()}
        self._anchor = {name: before[name].lerp(tensor, 1 - decay) for name, tensor in own.items()}

    def base_logps(self, pairs: Sequence[Encoded]) -> PairLogps:
        """The base's log-probs of encoded ``pairs``, which came with them."""
        return PairLogps(*_columns((p.reference_chosen, p.reference_rejected) for p in pairs).to(self.device))

    @torch.no_grad()
    def reference(self, pairs: Sequence[Encoded]) -> PairLogps:
        """The log-probs that preferences are measured against: the base's, or the anchor's where that moves."""
        if self._anchor is None:
            return self.base_logps(pairs)
        own = {name: tensor.clone() for name, tensor in self.tensors().items()}
        self.load(self._anchor)
        try:
            return self.score(pairs).policy
        finally:
            self.load(own)

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, the model is the base."""
        self._switch.is_on = False
        try:
            yield
        finally:
            self._switch.is_on = True

    @contextmanager
    def _only(self, layers: slice, *, has_norm: bool) -> Iterator[None]:
        """Inside, the decoder consists of ``layers``, with or without its last norm."""
        norm = self._decoder.norm
        self._decoder.layers = self._layers[layers]
        self._decoder.norm = norm if has_norm else nn.Identity()
        try:
            yield
        finally:
            self._decoder.layers, self._decoder.norm = self._layers, norm

    def _decode(self, rows: Rows, **inputs: Any) -> Tensor:
        if isinstance(rows.sees, Segments):  # a mask that is there is not made, and nobody looks at it
            inputs |= {"segments": rows.sees, "attention_mask": rows.tokens_BT[:1, :1, None, None]}
        else:
            inputs["attention_mask"] = rows.sees
        hidden: Tensor = self._decoder(**inputs, position_ids=rows.positions_BT, use_cache=False).last_hidden_state
        return hidden

    def lower(self, rows: Rows) -> Tensor:
        """What the untrained layers make of ``rows``: B, T, D."""
        with torch.no_grad(), self._only(slice(0, self._first), has_norm=False):
            return self._decode(rows, input_ids=rows.tokens_BT)

    def upper(self, rows: Rows, hidden_BTD: Tensor) -> Tensor:
        """Logits of the predicted tokens, from ``lower``'s result: M, V."""
        logits_MV: Tensor = self._head(self._last(rows, hidden_BTD))
        return logits_MV

    def _last(self, rows: Rows, hidden_BTD: Tensor) -> Tensor:
        """What goes into the output layer where a token is predicted, from ``lower``'s result: M, D."""
        with self._only(slice(self._first, None), has_norm=True):
            out_BTD = self._decode(rows, inputs_embeds=hidden_BTD)
        return out_BTD.flatten(0, 1)[rows.source_M]

    def _score(self, rows: Rows, hidden_BTD: Tensor) -> tuple[PairLogps, PairLogps]:
        """Of each side the (weighted) sum of its tokens' log-probs, and its alignment, from ``lower``'s result."""
        logps_M, sharpness_M = token_logps(self._head, self._last(rows, hidden_BTD), rows.target_M)
        sums = _by_side(rows, logps_M * rows.weight_M)
        with torch.no_grad():
            aligned, counts = _by_side(rows, logps_M - sharpness_M), _by_side(rows, torch.ones_like(logps_M))
        means = (total_B / count_B.clamp(min=1) for total_B, count_B in zip(aligned, counts, strict=True))
        return sums, PairLogps(*means)

    def encode(
        self, pairs: Sequence[PairTokens], references: Sequence[tuple[float, float]] | None = None
    ) -> list[Encoded]:
        """Run ``pairs`` through the lower layers once and for all, and through the reference unless that is given.

        ``references``: the sums of the reference's log-probs over each pair's chosen and rejected tokens.
        """
        rows = self._pack(pairs, self.ld_alpha).to(self.device)
        hidden_BTD = self.lower(rows)
        if references is None:
            with torch.no_grad(), self.as_reference():
                (chosen_B, rejected_B), _ = self._score(rows, hidden_BTD)
            references = list(zip(chosen_B.tolist(), rejected_B.tolist(), strict=True))
        hidden_TD, columns = hidden_BTD.flatten(0, 1), zip(pairs, rows.starts, references, strict=True)
        return [Encoded(pair, hidden_TD[at : at + pair.total].clone(), *reference) for pair, at, reference in columns]

    def score(self, pairs: Sequence[Encoded]) -> Scored:
        """Encoded ``pairs`` under the policy as it is now."""
        rows = self._pack([pair.tokens for pair in pairs], self.ld_alpha).to(self.device)
        ends = [*rows.starts[1:], rows.tokens_BT.numel()]
        room = [end - start for start, end in zip(rows.starts, ends, strict=True)]
        parts = [pad(p.hidden_TD, (0, 0, 0, most - p.tokens.total)) for p, most in zip(pairs, room, strict=True)]
        policy, alignment = self._score(rows, torch.cat(parts).view(*rows.tokens_BT.shape, -1))
        return Scored(policy, _by_side(rows, rows.weight_M), alignment)


def _columns(values: Iterator[tuple[float, float]]) -> Tensor:
    return torch.tensor(list(values)).T


def _by_side(rows: Rows, values_M: Tensor) -> PairLogps:
    """Sums of ``values_M`` over each side of each pair."""
    sums_N = values_M.new_zeros(2 * rows.pairs).index_add(0, rows.side_M, values_M)
    return PairLogps(sums_N[: rows.pairs], sums_N[rows.pairs :])


def native_dtype() -> torch.dtype:
    """bfloat16 where this machine multiplies it natively, else float32 (emulated bf16 is up to 30 times slower)."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def load_model(folder: Path, dtype: str, rank: int = 0) -> tuple[nn.Module, Tokenizer]:
    """The base model in ``folder`` on GPU number ``rank`` if there are any, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chosen = native_dtype() if dtype == "auto" else getattr(torch, dtype)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=chosen)
    device = torch.device(f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu")
    return model.to(device), AutoTokenizer.from_pretrained(folder)


def load_policy(config: TrainerConfig, rank: int = 0) -> Policy:
    """The base model with fresh adapters, for process number ``rank`` of a trainer."""
    model, tokenizer = load_model(Path(config.model), config.dtype, rank)
    return Policy(
        model, tokenizer,
        rank=config.rank, alpha=config.alpha, layers=config.layers, targets=config.targets, seed=config.seed,
        ld_alpha=config.ld_alpha,
    )  # fmt: skip
