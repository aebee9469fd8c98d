"""Log-probs of given tokens behind a frozen output layer, without ever holding the logits of all positions.

The gradient of log p(token) with respect to its hidden state is (onehot − p)·W. W does not learn, so that row is at
hand when p is, in the forward pass, whatever loss comes behind: one matrix product, and D numbers to keep a position in
place of V. M positions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

CHUNK, GPU_CHUNK = 256, 2048  # positions whose logits exist at the same time


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_M: Tensor
    ) -> tuple[Tensor, Tensor]:
        is_learning = ctx.needs_input_grad[0]
        slope_MD = torch.empty_like(hidden_MD) if is_learning else hidden_MD.new_empty(0)
        logps_M = hidden_MD.new_empty(len(target_M), dtype=torch.float32)
        sharpness_M = torch.empty_like(logps_M)
        chunk = GPU_CHUNK if hidden_MD.is_cuda else CHUNK
        for start in range(0, len(target_M), chunk):
            part = slice(start, start + chunk)
            target_C = target_M[part, None]
            logps_CV = linear(hidden_MD[part], weight_VD, bias_V).log_softmax(-1, dtype=torch.float32)
            logps_M[part] = logps_CV.gather(1, target_C).squeeze(1)
            p_CV = logps_CV.exp_()
            sharpness_M[part] = torch.linalg.vector_norm(p_CV, dim=-1).log_().mul_(2)
            if is_learning:
                p_CV.scatter_add_(
                    1, target_C, p_CV.new_full(target_C.shape, -1.0)
                )  # p − onehot: exact where p is near 1
                slope_MD[part] = -(p_CV.to(weight_VD.dtype) @ weight_VD)
        ctx.save_for_backward(slope_MD)
        ctx.mark_non_differentiable(sharpness_M)
        return logps_M, sharpness_M

    @staticmethod
    def backward(ctx: Any, pull_M: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (slope_MD,) = ctx.saved_tensors
        return slope_MD * pull_M[:, None].to(slope_MD.dtype), None, None, None


def token_logps(head: torch.nn.Linear, hidden_MD: Tensor, target_M: Tensor) -> tuple[Tensor, Tensor]:
    """log p(target) and log Σ_v p(v)² at each position, both of shape M in fp32.

    Gradients flow from the first into ``hidden_MD``; ``head`` gets none.
    """
    both: tuple[Tensor, Tensor] = _TokenLogps.apply(hidden_MD, head.weight.detach(), head.bias, target_M)
    return both
