"""Our losses, metrics and gradients against TRL's, on the same model, adapters and pairs."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOTrainer

from online_trainer.batches import PairTokens, completion_tokens, prompt_tokens
from online_trainer.objective import (
    Objective,
    PairLogps,
    kto_loss,
    on_policy_weights,
    preference_loss,
    reward_metrics,
)
from online_trainer.policy import Policy
from telemetry.events import Message
from tests.unit.online_trainer.kit import completion, tiny_folder, tiny_policy
from tests.unit.online_trainer.test_policy import scramble

ROWS = [("question one", "a long good answer", "bad"), ("why?", "yes", "no, not at all"), ("x", "same", "size")]
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # TRL 1.16's own call
BETA = 0.1
TOLERANCE = 1e-5  # relative, in fp32
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


def trl_loss(
    policy: Policy, reference: nn.Module, folder: Path, objective: str, **settings: Any
) -> tuple[Tensor, dict[str, float]]:
    """(loss with its graph, metrics) of TRL for the same tokens, on the very modules of ``policy``."""
    texts = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in ROWS]  # replaced by our tokens below
    arguments = DPOConfig(
        output_dir=str(folder.parent / "trl"), beta=BETA, loss_type=[objective], report_to=[], use_cpu=True,
        bf16=False, activation_checkpointing=False, max_length=None, disable_dropout=True, **settings,
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


def our_loss(
    policy: Policy, objective: Objective, *, label_smoothing: float = 0.0, use_weighting: bool = False
) -> tuple[Tensor, dict[str, float]]:
    encoded = policy.encode(pairs_of(policy))
    own, lengths, alignment = policy.score(encoded)
    reference = policy.reference(encoded)
    loss_B = preference_loss(own, reference, lengths, objective=objective, beta=BETA, label_smoothing=label_smoothing)
    if use_weighting:
        loss_B = loss_B * on_policy_weights(alignment)
    values = reward_metrics(own, reference, BETA)
    return loss_B.mean(), {name: values[name].detach().mean().item() for name in METRICS}


def gradients(policy: Policy, loss: Tensor) -> list[Tensor]:
    policy.model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return [parameter.grad.clone() for parameter in policy.parameters() if parameter.grad is not None]


def assert_gradients_agree(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) == 14
    for mine, other in zip(ours, theirs, strict=True):
        difference = torch.linalg.vector_norm(mine - other) / torch.linalg.vector_norm(other)
        assert difference.item() <= TOLERANCE


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("sigmoid", {}),
        ("ipo", {}),
        ("robust", {"label_smoothing": 0.2}),
        ("sigmoid", {"ld_alpha": 0.3}),
        ("sigmoid", {"use_weighting": True}),
        ("robust", {"label_smoothing": 0.1, "ld_alpha": 0.5, "use_weighting": True}),
    ],
)
def test_loss_metrics_and_gradients_are_those_of_trl(
    tiny_model: Path, objective: Objective, settings: dict[str, Any]
) -> None:
    reference = tiny_policy(tiny_model).model  # adapters at zero: the base
    policy = tiny_policy(tiny_model)
    scramble(policy, 0.1)
    policy.ld_alpha = settings.get("ld_alpha", 1.0)
    own_settings = {name: value for name, value in settings.items() if name != "ld_alpha"}
    ours, our_metrics = our_loss(policy, objective, **own_settings)
    our_gradients = gradients(policy, ours)
    theirs, their_metrics = trl_loss(policy, reference, tiny_model, objective, **settings)
    assert ours.item() == pytest.approx(theirs.item(), rel=TOLERANCE)
    assert our_metrics == pytest.approx(their_metrics, rel=1e-4, abs=1e-4)
    assert_gradients_agree(our_gradients, gradients(policy, theirs))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_simpo_is_that_of_trl(label_smoothing: float) -> None:
    torch.manual_seed(5)
    lengths = PairLogps(torch.tensor([3.0, 9.0, 40.0]), torch.tensor([5.0, 2.0, 41.0]))
    values = [(-torch.rand(3) * side).requires_grad_() for side in lengths]
    theirs, *_ = CPOTrainer.cpo_loss(
        SimpleNamespace(
            alpha=0.0, beta=2.0, simpo_gamma=0.7, loss_type="simpo", label_smoothing=label_smoothing,
            accelerator=SimpleNamespace(device="cpu"),
        ),
        *(value / side for value, side in zip(values, lengths, strict=True)),
    )  # fmt: skip
    ours = preference_loss(
        PairLogps(*values), PairLogps(torch.zeros(3), torch.zeros(3)), lengths,
        objective="simpo", beta=2.0, target_margin=0.7, label_smoothing=label_smoothing,
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=0.0)
    for mine, other in zip(
        torch.autograd.grad(ours.sum(), values), torch.autograd.grad(theirs.sum(), values), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=TOLERANCE, atol=0.0)


def test_kto_is_that_of_trl(tiny_model: Path) -> None:
    reference, policy = tiny_policy(tiny_model).model, tiny_policy(tiny_model)
    scramble(policy, 0.1)
    texts = [{"prompt": p, "completion": c, "label": bool(n % 2)} for n, (p, c, _) in enumerate(ROWS)]
    arguments = KTOConfig(
        output_dir=str(tiny_model.parent / "kto"), beta=BETA, report_to=[], use_cpu=True, bf16=False, max_length=None,
        activation_checkpointing=False, disable_dropout=True, per_device_train_batch_size=len(ROWS),
    )  # fmt: skip
    trainer = KTOTrainer(
        policy.model, reference, args=arguments, train_dataset=Dataset.from_list(texts),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )  # fmt: skip
    pairs = [pair._replace(rejected=()) for pair in pairs_of(policy)]
    others = [*pairs[1:], pairs[0]]  # TRL estimates the divergence on answers to other questions
    rows = [
        {
            "prompt_ids": list(pair.prompt), "completion_ids": list(pair.chosen), "label": text["label"],
            "KL_completion_ids": list(other.chosen),
        }
        for pair, other, text in zip(pairs, others, texts, strict=True)
    ]  # fmt: skip
    theirs = trainer.compute_loss(trainer.model.train(), trainer.data_collator(rows))
    kl = trainer._metrics["train"]["kl"][-1]
    encoded = policy.encode(pairs)
    ratio_N = policy.score(encoded).policy.chosen_B - policy.reference(encoded).chosen_B
    ours = kto_loss(ratio_N, torch.tensor([text["label"] for text in texts]), torch.full_like(ratio_N, kl), BETA).mean()
    assert ours.item() == pytest.approx(theirs.item(), rel=TOLERANCE)
    assert_gradients_agree(gradients(policy, ours), gradients(policy, theirs))


def test_before_the_first_step_both_say_ln_2(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model)
    theirs, _ = trl_loss(policy, tiny_policy(tiny_model).model, tiny_model, "sigmoid")
    ours, _ = our_loss(policy, "sigmoid")
    assert ours.item() == pytest.approx(math.log(2), abs=1e-5)
    assert theirs.item() == pytest.approx(math.log(2), abs=1e-5)
