"""OpenAI's formula: logit − frequency · count − presence · (count > 0) + bias."""

from __future__ import annotations

import torch

from serving.shaping import Shaping
from serving.wire import Sampling


def test_penalties_and_biases_follow_the_formula_and_leave_the_models_logits_alone() -> None:
    asked = Sampling(max_tokens=9, frequency_penalty=0.5, presence_penalty=1.25, logit_bias={0: 3.0, 3: -2.0})
    shaping = Shaping(asked, None)
    logits_V = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert shaping.shaped(logits_V).tolist() == [4.0, 2.0, 3.0, 2.0], "nothing was said yet"
    for token_id in (1, 1, 3):
        assert shaping.accept(token_id)
    assert shaping.shaped(logits_V).tolist() == [4.0, 2.0 - 1.0 - 1.25, 3.0, 4.0 - 0.5 - 1.25 - 2.0]
    assert logits_V.tolist() == [1.0, 2.0, 3.0, 4.0]
