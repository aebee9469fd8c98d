"""Our losses, metrics and gradients against TRL's, on the same model, adapters and pairs."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from online_trainer.batches import completion_tokens, prompt_tokens
from online_trainer.batches import PairTokens
from online_trainer.objective import Objective, preference_loss, reward_metrics
from online_trainer.policy import Policy
from telemetry.events import Message
from tests.unit.online_trainer.kit import completion, tiny_folder, tiny_policy
from tests.unit.online_trainer.test_policy import scramble

ROWS = [("question one", "a long good answer", "bad"), ("why?", "yes", "no, not at all"), ("x", "same", "size")]
BETA = 0.1


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


def trl_loss(policy: Policy, reference: nn.Module, folder: Path, out: Path, objective: str) -> tuple[Tensor, dict[str, float]]:
    """(loss with its graph, logged metrics) of TRL for ROWS, on the very modules of ``policy``."""
    data = [
        {"prompt": [{"role": "user", "content": p}], "chosen": [{"role": "assistant", "content": c}],
         "rejected": [{"role": "assistant", "content": r}]}
        for p, c, r in ROWS
    ]  # fmt: skip
    arguments = DPOConfig(
        output_dir=str(out), beta=BETA, loss_type=[objective], per_device_train_batch_size=len(ROWS), report_to=[],
        use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None, disable_dropout=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = DPOTrainer(
        policy.model, reference, args=arguments, train_dataset=Dataset.from_list(data), processing_class=tokenizer
    )
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(len(ROWS))])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    metrics = {name: float(values[-1]) for name, values in trainer._metrics["train"].items() if values}
    return loss, metrics


def our_loss(policy: Policy, objective: Objective) -> tuple[Tensor, dict[str, float]]:
    pairs = [
        PairTokens(
            prompt_tokens(policy.tokenizer, (Message(role="user", content=p),), 999),
            completion_tokens(policy.tokenizer, completion(c), 999),
            completion_tokens(policy.tokenizer, completion(r), 999),
        )
        for p, c, r in ROWS
    ]
    own, reference, lengths = policy.logps(policy.encode(pairs))
    loss_B = preference_loss(own, reference, lengths, objective=objective, beta=BETA)
    values = reward_metrics(own, reference, BETA)
    return loss_B.mean(), {name: value_B.detach().mean().item() for name, value_B in values.items()}
