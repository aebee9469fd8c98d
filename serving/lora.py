"""Many versions in one batch: linears that add, per stretch of tokens, the low-rank delta of its version.

Linears that read the same input (q, k, v; gate, up) are fused, base and adapter alike: one base matmul, one
A-matmul, one B-matmul for the group, B block-diagonal. Adapters lie in preallocated slots; slot 0 is the
base and costs nothing, and a step whose tokens are all of one version does two plain matmuls a group. A step that is
replayed cannot know its stretches: each of its tokens names its slot (``per_token``).

Dimensions: I inputs, O outputs of the whole group, M members, R rank, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from serving.decode_ops import DecodeOps, Delta
from serving.product import Product, product

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Segment(NamedTuple):
    """Tokens start…stop of the step belong to the version in ``slot``."""

    slot: int
    start: int
    stop: int


class EachToken(NamedTuple):
    """The version of each token, and what computes its delta."""

    slots_T: Tensor
    ops: DecodeOps


class ShapeMismatch(ValueError):
    """An adapter's tensors do not fit the base model they are meant for."""


class FusedLinear:
    """One product for linears of one input, with the adapters of all slots. No module: it is asked too often."""

    def __init__(self, members: list[nn.Linear], stack: LoraStack) -> None:
        first = members[0]
        self.sizes = [member.out_features for member in members]
        bias: Tensor | None = None
        if any(member.bias is not None for member in members):
            bias = torch.cat([m.weight.new_zeros(m.out_features) if m.bias is None else m.bias.data for m in members])
        weight = torch.cat([m.weight.data for m in members])
        self._multiply: Product = product(weight, bias, many=stack.many_dtype)
        self._stack = stack
        width, outputs = len(members) * stack.rank_max, sum(self.sizes)
        device = first.weight.device
        self.a = torch.zeros(stack.slots + 1, first.in_features, width, dtype=stack.dtype, device=device)
        self.b = torch.zeros(stack.slots + 1, width, outputs, dtype=stack.dtype, device=device)
        self._deltas: list[tuple[Tensor, Tensor] | None] = [None] * (stack.slots + 1)  # views of a and b
        self._input: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def member(self, index: int, x: Tensor) -> Tensor:
        """Output ``index``; the whole group is computed when its first member sees the input."""
        if x is not self._input:
            self._input, self._outputs = x, self.compute(x).split_with_sizes(self.sizes, dim=-1)
        output = self._outputs[index]
        if index == len(self.sizes) - 1:
            self._input, self._outputs = None, ()
        return output

    def compute(self, x: Tensor) -> Tensor:
        """The outputs of all members, side by side."""
        y, each = self._multiply(x), self._stack.each_token
        if each is not None:
            each.ops.add_deltas(y.view(-1, y.shape[-1]), self._delta(x, each))
        elif self._stack.segments:
            self._add_deltas(x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
        return y

    def compute_apart(self, x_TI: Tensor) -> tuple[Tensor, Delta | None]:
        """The base's outputs of all members, and what the adapters of a step that is replayed add to them."""
        each = self._stack.each_token
        return self._multiply(x_TI), None if each is None else self._delta(x_TI, each)

    def _delta(self, x: Tensor, each: EachToken) -> Delta:
        ranks_S = self._stack.ranks_S
        low = each.ops.shrink(x.reshape(-1, x.shape[-1]), self.a, each.slots_T, ranks_S, len(self.sizes))
        return Delta(low, self.b, each.slots_T, ranks_S, self.sizes)

    def _add_deltas(self, x_TI: Tensor, y_TO: Tensor) -> None:
        if x_TI.dtype != self.a.dtype:
            x_TI = x_TI.to(self.a.dtype)
        for slot, start, stop in self._stack.segments:
            delta = self._deltas[slot]
            if delta is None:
                continue
            a_IR, b_RO = delta
            is_all = stop - start == x_TI.shape[0]
            x, y = (x_TI, y_TO) if is_all else (x_TI[start:stop], y_TO[start:stop])
            if y.dtype == a_IR.dtype:
                y.addmm_(x.mm(a_IR), b_RO)
            else:
                y += x @ a_IR @ b_RO

    def write(self, slot: int, index: int, a_RI: Tensor, b_OR: Tensor) -> None:
        """Put one member's adapter into ``slot``; its rank is the stack's rank for that slot."""
        rank = self._stack.ranks[slot]
        before = sum(self.sizes[:index])
        rows = slice(index * rank, (index + 1) * rank)
        self.a[slot, :, rows].copy_(a_RI.T)
        self.b[slot, rows, before : before + self.sizes[index]].copy_(b_OR.T)
        width = len(self.sizes) * rank
        self._deltas[slot] = self.a[slot, :, :width], self.b[slot, :width]

    def clear(self, slot: int) -> None:
        """Empty ``slot``, so that the next adapter meets zeros where it has no tensors."""
        self._deltas[slot] = None
        self.a[slot].zero_()
        self.b[slot].zero_()


class Member(nn.Module):
    """Stands where one of the group's linears stood."""

    def __init__(self, group: FusedLinear, index: int) -> None:
        super().__init__()
        self.group = group
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return self.group.member(self.index, x)


class LoraStack:
    """All fused linears of a model; ``segments`` says which version each token of the step belongs to."""

    def __init__(
        self, model: nn.Module, *, slots: int, rank_max: int, dtype: torch.dtype, many_dtype: torch.dtype | None = None
    ) -> None:
        self.slots, self.rank_max, self.dtype, self.many_dtype = slots, rank_max, dtype, many_dtype
        self.ranks = [0] * (slots + 1)
        self.ranks_S = torch.zeros(slots + 1, dtype=torch.int32, device=next(model.parameters()).device)
        self.segments: list[Segment] = []
        self.each_token: EachToken | None = None
        self.targets: dict[str, tuple[FusedLinear, int]] = {}
        for name in [name for name, _ in model.named_modules()]:  # by name: what is fused can go, one group at a time
            self._fuse_children(name, model.get_submodule(name), keep=model.get_output_embeddings())  # type: ignore[operator]

    def _fuse_children(self, name: str, parent: nn.Module, keep: nn.Module) -> None:
        linears = {k: m for k, m in parent.named_children() if type(m) is nn.Linear and m is not keep}
        groups = [list(g) for g in SHARED_INPUTS if all(member in linears for member in g)]
        groups += [[k] for k in linears if not any(k in group for group in groups)]
        for group in groups:
            fused = FusedLinear([linears[k] for k in group], self)
            for index, child in enumerate(group):
                setattr(parent, child, Member(fused, index))
                self.targets[f"{name}.{child}"] = (fused, index)

    def set_segments(self, slots_T: list[int]) -> None:
        """Note the versions of a step's tokens, which are sorted by slot."""
        segments: list[Segment] = []
        for i, slot in enumerate(slots_T):
            if segments and segments[-1].slot == slot:
                segments[-1] = Segment(slot, segments[-1].start, i + 1)
            else:
                segments.append(Segment(slot, i, i + 1))
        self.segments = [segment for segment in segments if segment.slot]

    @contextmanager
    def per_token(self, slots_T: Tensor | None, ops: DecodeOps) -> Iterator[None]:
        """Inside, each token is of the version in its slot; None: all are the base's."""
        self.segments, self.each_token = [], None if slots_T is None else EachToken(slots_T, ops)
        try:
            yield
        finally:
            self.each_token = None

    def write(self, slot: int, tensors: Mapping[str, Tensor], *, rank: int, scaling: float) -> None:
        """Fill a slot that no request uses from ``<module>.lora_{A,B}.weight``; raises ShapeMismatch.

        Safe beside a running step: nothing reads the slot before its version is ready.
        """
        if rank > self.rank_max:
            raise ShapeMismatch(f"rank {rank} is above rank_max {self.rank_max} of this base model's configuration")
        self.ranks[slot] = rank
        self.ranks_S[slot] = rank
        written = 0
        for name, (group, index) in self.targets.items():
            a_RI, b_OR = tensors.get(f"{name}.lora_A.weight"), tensors.get(f"{name}.lora_B.weight")
            if a_RI is None or b_OR is None:
                continue
            wanted = ((rank, group.a.shape[1]), (group.sizes[index], rank))
            if (tuple(a_RI.shape), tuple(b_OR.shape)) != wanted:
                raise ShapeMismatch(f"{name}: A {tuple(a_RI.shape)}, B {tuple(b_OR.shape)}; expected {wanted}")
            group.write(slot, index, a_RI, b_OR * scaling)
            written += 2
        if written != len(tensors):
            unknown = sorted({n.rsplit(".lora_", 1)[0] for n in tensors} - set(self.targets))
            raise ShapeMismatch(f"{len(tensors) - written} tensors have no place in the base model: {unknown[:3]} …")

    def clear(self, slot: int) -> None:
        """Empty a slot that no request uses."""
        self.ranks[slot] = 0
        self.ranks_S[slot] = 0
        for group in {id(group): group for group, _ in self.targets.values()}.values():
            group.clear(slot)
