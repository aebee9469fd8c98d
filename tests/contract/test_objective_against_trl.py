"""Our losses, metrics and gradients against TRL's, on the same model, adapters and pairs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from online_trainer.batches import PairTokens, completion_tokens, prompt_tokens
from online_trainer.objective import Objective, preference_loss, reward_metrics
from online_trainer.policy import Policy
from telemetry.events import Message
from tests.unit.online_trainer.kit import completion, tiny_folder, tiny_policy
from tests.unit.online_trainer.test_policy import scramble

ROWS = [("question one", "a long good answer", "bad"), ("why?", "yes", "no, not at all"), ("x", "same", "size")]
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # TRL 1.16's own call
BETA = 0.1
METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


def pairs_of(policy: Policy) -> list[PairTokens]:
    return [
        PairTokens(
            prompt_tokens(policy.tokenizer, (Message(role="user", content=prompt),), 999),
            completion_tokens(policy.tokenizer, completion(chosen), 999),
            completion_tokens(policy.tokenizer, completion(rejected), 999),
        )
        for prompt, chosen, rejected in ROWS
    ]


def trl_loss(policy: Policy, reference: nn.Module, folder: Path, objective: str) -> tuple[Tensor, dict[str, float]]:
    """(loss with its graph, metrics) of TRL for the same tokens, on the very modules of ``policy``."""
    texts = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in ROWS]  # replaced by our tokens below
    arguments = DPOConfig(
        output_dir=str(folder.parent / "trl"), beta=BETA, loss_type=[objective], report_to=[], use_cpu=True,
        bf16=False, activation_checkpointing=False, max_length=None, disable_dropout=True,
    )  # fmt: skip
    trainer = DPOTrainer(
        policy.model, reference, args=arguments, train_dataset=Dataset.from_list(texts),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    batch = trainer.data_collator([dict(zip(names, map(list, pair), strict=True)) for pair in pairs_of(policy)])
    loss = trainer.compute_loss(trainer.model.train(), batch)
    metrics = trainer._metrics["train"]
    return loss, {name: metrics[name][-1] for name in METRICS}


def our_loss(policy: Policy, objective: Objective) -> tuple[Tensor, dict[str, float]]:
    own, reference, lengths = policy.logps(policy.encode(pairs_of(policy)))
    loss_B = preference_loss(own, reference, lengths, objective=objective, beta=BETA)
    values = reward_metrics(own, reference, BETA)
    return loss_B.mean(), {name: values[name].detach().mean().item() for name in METRICS}


def gradients(policy: Policy, loss: Tensor) -> list[Tensor]:
    policy.model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return [parameter.grad.clone() for parameter in policy.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("objective", ["sigmoid", "ipo"])
def test_loss_metrics_and_gradients_are_those_of_trl(tiny_model: Path, objective: Objective) -> None:
    reference = tiny_policy(tiny_model).model  # adapters at zero: the base
    policy = tiny_policy(tiny_model)
    scramble(policy, 0.1)
    ours, our_metrics = our_loss(policy, objective)
    our_gradients = gradients(policy, ours)
    theirs, their_metrics = trl_loss(policy, reference, tiny_model, objective)
    their_gradients = gradients(policy, theirs)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    assert our_metrics == pytest.approx(their_metrics, rel=1e-3, abs=1e-4)
    assert len(our_gradients) == len(their_gradients) == 14
    for mine, other in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-3, atol=1e-5)


def test_before_the_first_step_both_say_ln_2(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model)
    theirs, _ = trl_loss(policy, tiny_policy(tiny_model).model, tiny_model, "sigmoid")
    ours, _ = our_loss(policy, "sigmoid")
    assert ours.item() == pytest.approx(math.log(2), abs=1e-5)
    assert theirs.item() == pytest.approx(math.log(2), abs=1e-5)
