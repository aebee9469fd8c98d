"""The policy: adapters on, off, saved, loaded, shrunk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from online_trainer.errors import IncompatibleAdapter
from online_trainer.policy import LoraLinear, Policy, Switch, in_base_type
from tests.unit.online_trainer.kit import tiny_policy, tokens, with_settings

PAIR = tokens(5, 4, 3)


def scramble(policy: Policy, scale: float = 0.3) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for adapter in policy.adapters.values():
            adapter.lora_B.normal_(0, scale)


def margins(policy: Policy) -> float:
    encoded = policy.encode([PAIR])
    own, reference = policy.score(encoded).policy, policy.reference(encoded)
    return (own.chosen_B - reference.chosen_B - own.rejected_B + reference.rejected_B).item()


def test_a_fresh_policy_is_its_reference(policy: Policy) -> None:
    assert margins(policy) == pytest.approx(0.0, abs=1e-4)


def test_the_reference_ignores_what_was_learned(policy: Policy) -> None:
    before = policy.encode([PAIR])[0]
    scramble(policy)
    after = policy.encode([PAIR])[0]
    assert after.reference_chosen == pytest.approx(before.reference_chosen, abs=1e-4)
    assert abs(margins(policy)) > 0.01


def test_only_the_topmost_layers_are_trained_and_their_names_are_those_of_the_version_store(policy: Policy) -> None:
    names = policy.tensors()
    assert len(names) == 7 * 2  # seven linears of one layer, A and B
    assert names["model.layers.1.self_attn.q_proj.lora_A.weight"].shape == (4, 64)
    assert names["model.layers.1.mlp.down_proj.lora_B.weight"].shape == (64, 4)
    assert all(name.startswith("model.layers.1.") for name in names)


def test_the_top_alone_gives_the_same_gradients_as_the_whole_model(tiny_model: Path) -> None:
    policy = tiny_policy(tiny_model)
    scramble(policy)
    own = policy.score(policy.encode([PAIR])).policy
    own.chosen_B.sum().backward()  # type: ignore[no-untyped-call]
    found = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    policy.model.zero_grad()
    ids = torch.tensor([PAIR.prompt + PAIR.chosen])
    logits = policy.model(input_ids=ids).logits[0, len(PAIR.prompt) - 1 : -1]
    logits.log_softmax(-1).gather(1, torch.tensor(PAIR.chosen)[:, None]).sum().backward()
    wanted = [p.grad for p in policy.parameters() if p.grad is not None]
    assert len(found) == len(wanted) == 14
    for ours, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)


def test_saved_tensors_bring_back_the_same_policy(policy: Policy, tiny_model: Path) -> None:
    scramble(policy)
    other = tiny_policy(tiny_model)
    other.load(policy.tensors())
    assert margins(other) == pytest.approx(margins(policy), abs=1e-5)


def test_an_adapter_of_another_rank_is_refused_and_changes_nothing(policy: Policy, tiny_model: Path) -> None:
    other = tiny_policy(tiny_model, with_settings(rank=2))
    scramble(policy)
    before = margins(policy)
    with pytest.raises(IncompatibleAdapter):
        policy.load(other.tensors())
    assert margins(policy) == before


def test_shrinking_to_nothing_is_the_base_and_reset_starts_anew(policy: Policy) -> None:
    fresh = policy.tensors()
    scramble(policy)
    policy.shrink(0.0)
    assert margins(policy) == pytest.approx(0.0, abs=1e-4)
    scramble(policy)
    policy.reset()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in policy.tensors().items())


def test_more_layers_than_the_model_has_means_all(tiny_model: Path) -> None:
    assert len(tiny_policy(tiny_model, with_settings(layers=50)).adapters) == 14


def test_an_adapted_linear_in_the_base_s_type_is_the_one_in_two_types() -> None:
    torch.manual_seed(3)
    base, x = torch.nn.Linear(6, 5), torch.randn(2, 4, 6)
    found = []
    for is_in_base_type in (False, True):
        lora, inputs = LoraLinear(base, 3, 0.7, Switch()), x.clone().requires_grad_()
        torch.manual_seed(4)
        with torch.no_grad():
            lora.lora_A.normal_(), lora.lora_B.normal_()
        y = in_base_type(base, inputs, lora.lora_A, lora.lora_B, 0.7) if is_in_base_type else lora(inputs)
        y.square().sum().backward()
        found.append([y, inputs.grad, lora.lora_A.grad, lora.lora_B.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
