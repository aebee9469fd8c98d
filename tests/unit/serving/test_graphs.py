"""Decoding in fixed shapes says what decoding step by step says, whatever fills a bucket; capture needs a GPU."""

from __future__ import annotations

from collections.abc import Sequence as Many
from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from serving import decode_ops
from serving.fused import FusedDecoder, ModelDecoder, is_known
from serving.runner import Runner
from serving.scheduler import Copy, Plan, Sequence, Work
from tests.unit.serving.kit import adapter_tensors

CONTEXT, BATCH = 64, 6
SHAPE = {
    "vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip
OTHERS = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),  # biases
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 9}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),  # norms of its own: not a known shape
}


def runner_of(folder: Path, slots: int = 3, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Runner:
    torch.set_num_threads(1)
    runner = Runner(
        folder, dtype=dtype, device=device, slots=slots, rank_max=8, rows=BATCH + 2, max_context=CONTEXT
    )  # fmt: skip
    for slot, rank in ((1, 4), (2, 8)):
        tensors = adapter_tensors(folder, slot, rank)
        runner.lora.write(slot, {name: t.to(runner.device, dtype) for name, t in tensors.items()}, rank=rank, scaling=1)
    return runner


def read_prompts(runner: Runner, slots: Many[int], first: int = 3) -> list[Sequence]:
    """Sequences of different lengths in rows 0, 1, …, all but their last token read."""
    sequences = []
    for row, slot in enumerate(slots):
        tokens = [(31 * row + 7 * i + 1) % 250 for i in range(first + 5 * row)]
        sequence = Sequence(str(slot), slot, tokens, len(tokens), row=row)
        runner.run(Plan([], [Work(sequence, 0, len(tokens) - 1, False)], 0))
        sequences.append(sequence)
    return sequences


def decoded(sequences: list[Sequence]) -> Plan:
    return Plan([], [Work(s, len(s.tokens) - 1, len(s.tokens), True) for s in sequences], len(sequences))


@pytest.fixture(params=["llama", *OTHERS])
def model(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Path:
    if request.param == "llama":
        return tiny_model
    torch.manual_seed(3)
    kind, config, changes = OTHERS[request.param]
    kind(config(**(SHAPE | changes), initializer_range=0.2)).save_pretrained(tmp_path)
    return tmp_path


def test_only_shapes_that_are_fused_are_known(model: Path) -> None:
    assert is_known(runner_of(model).model, 16) == (runner_of(model).model.config.model_type != "qwen3")


@pytest.mark.parametrize("slots", [(0,), (2,), (0, 0, 0), (1, 0, 2, 1, 2), (0, 1, 2, 0, 1, 2)])
def test_a_replayed_step_says_what_a_step_says(model: Path, slots: tuple[int, ...]) -> None:
    runner = runner_of(model)
    sequences = read_prompts(runner, slots)
    expected = runner.run(decoded(sequences))
    runner.replay_decoding(BATCH)
    sequences = read_prompts(runner, slots)
    made = runner.step(decoded(sequences))
    assert torch.allclose(made.logits, expected, atol=1e-4)
    assert made.summary is not None and made.summary[0].tolist() == expected.argmax(dim=-1).tolist()


@pytest.mark.parametrize("decoder", [FusedDecoder, ModelDecoder])
def test_each_way_to_compute_a_step_passes_the_check(tiny_model: Path, decoder: type) -> None:
    runner = runner_of(tiny_model)
    runner.replay_decoding(BATCH)
    assert isinstance(runner._graphs._decoder, FusedDecoder)  # type: ignore[union-attr]
    runner._graphs._decoder = decoder(runner.model, runner.kv, runner.lora, decode_ops)  # type: ignore[union-attr]
    runner._check(runner._graphs)


def test_lanes_without_a_sequence_change_nobodys_memory(tiny_model: Path) -> None:
    runner = runner_of(tiny_model)
    runner.replay_decoding(BATCH)
    sequences = read_prompts(runner, (1, 0, 2, 1, 2, 0))
    before = runner.kv.keys.clone(), runner.kv.values.clone()
    runner.step(decoded(sequences[:3]))  # a bucket of four
    for kept, now in zip(before, (runner.kv.keys, runner.kv.values), strict=True):
        changed = (kept != now).flatten(3).any(-1).any(0).nonzero().tolist()  # [row, place]
        assert changed == [[s.row, len(s.tokens) - 1] for s in sequences[:3]] + [[BATCH + 2, 0]]


def test_a_version_loaded_later_is_seen_by_replays_that_exist(tiny_model: Path) -> None:
    runner = runner_of(tiny_model)
    sequences = read_prompts(runner, (1, 3))
    runner.replay_decoding(BATCH)
    runner.step(decoded(sequences))
    runner.lora.write(3, adapter_tensors(tiny_model, 9, 8), rank=8, scaling=1.0)
    replayed = runner.step(decoded(read_prompts(runner, (1, 3)))).logits
    assert torch.allclose(replayed, runner.run(decoded(sequences)), atol=1e-4)


class Lacking:
    """A device that has no room for a graph."""

    def __getattr__(self, name: str) -> object:
        return getattr(decode_ops, name)

    def attend(self, *_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")


def test_what_cannot_be_replayed_later_is_computed_all_the_same(tiny_model: Path) -> None:
    runner = runner_of(tiny_model)
    runner.replay_decoding(BATCH)
    plan = decoded(read_prompts(runner, (1, 0, 2)))
    expected = runner.run(plan)
    copies = [Copy(0, 4, 3), Copy(1, 0, 3)]  # carried out twice, row 4 would hold what row 1 held
    runner._graphs._decoder._ops = Lacking()  # type: ignore[union-attr]
    made = runner.step(plan._replace(copies=copies, work=plan.work[2:], decoding=1))
    assert runner._graphs is None and made.summary is None
    rows = runner.kv.keys
    assert torch.equal(rows[:, 0, :3], rows[:, 1, :3]) and not torch.equal(rows[:, 4, :3], rows[:, 1, :3])
    assert made.logits.isfinite().all() and expected.isfinite().all()


def test_a_way_that_fails_is_not_taken(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    runner = runner_of(tiny_model)
    runner._ways = lambda: [(FusedDecoder, Lacking()), (ModelDecoder, decode_ops)]  # type: ignore[method-assign,list-item]
    runner.replay_decoding(BATCH)
    assert isinstance(runner._graphs._decoder, ModelDecoder)  # type: ignore[union-attr]
    assert "decoding cannot be replayed" in caplog.text


@pytest.mark.parametrize("slots", [(0,), (1, 0, 2, 1)])
def test_prompts_read_at_once_say_what_prompts_say(model: Path, slots: tuple[int, ...]) -> None:
    runner = runner_of(model)
    found = []
    for reads_fresh in (False, True):
        runner._reads_fresh = reads_fresh
        decoder, *prompts = read_prompts(runner, (2, *slots))
        work = [Work(s, 0, len(s.tokens), True) for s in prompts]
        found.append(runner.run(Plan([], [*decoded([decoder]).work, *work], 1)))
    assert torch.allclose(*found, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="capture needs a GPU")
@pytest.mark.parametrize("slots", [(0,), (2,), (1, 0, 2, 1, 2)])
def test_a_captured_step_says_what_a_step_says(tiny_model: Path, slots: tuple[int, ...]) -> None:
    runner = runner_of(tiny_model, device="cuda", dtype=torch.bfloat16)
    expected = runner.run(decoded(read_prompts(runner, slots))).float()
    runner.replay_decoding(BATCH)
    assert runner._graphs is not None
    found = runner.step(decoded(read_prompts(runner, slots))).logits.float()
    assert float((found - expected).abs().max() / expected.abs().max()) < 0.05
