"""Tokens and rows: what each side sees, and how rows are grouped."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch
from msgspec import structs

from online_trainer.batches import PairTokens, completion_tokens, micro_batches, pack, prompt_tokens
from online_trainer.policy import Policy, load_model
from serving.prompts import PromptEncoder
from telemetry.events import Message, PreferenceRecorded, ToolCall, decode, encode
from tests.tool_model import make_tool_model, offered, tool
from tests.unit.online_trainer.kit import completion, tokens, verdict


def plain_logp(policy: Policy, prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    """Log-prob of ``answer`` by an ordinary forward pass over an ordinary sequence."""
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logits = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())


def test_a_shared_prompt_row_gives_both_sides_the_log_probs_of_two_ordinary_sequences(policy: Policy) -> None:
    pairs = [tokens(5, 3, 4), tokens(2, 6, 1, start=40), tokens(7, 1, 1, start=60)]
    with torch.no_grad():
        chosen_B, rejected_B = policy.score(policy.encode(pairs)).policy
    for index, pair in enumerate(pairs):
        assert abs(chosen_B[index].item() - plain_logp(policy, pair.prompt, pair.chosen)) < 1e-3
        assert abs(rejected_B[index].item() - plain_logp(policy, pair.prompt, pair.rejected)) < 1e-3


def test_pairs_in_one_flat_row_teach_what_pairs_in_padded_rows_teach(tiny_model: Path) -> None:
    pairs = [tokens(5, 3, 4), tokens(2, 6, 1, start=40), tokens(7, 2, 0, start=60), tokens(1, 1, 5, start=90)]
    found = []
    for is_flat in (False, True):
        model, tokenizer = load_model(tiny_model, "float32")
        policy = Policy(
            model, tokenizer, rank=4, alpha=8.0, layers=1, targets=("q_proj", "v_proj", "down_proj"), seed=0,
            is_flat=is_flat,
        )  # fmt: skip
        encoded = policy.encode(pairs)
        sums = policy.score(encoded).policy
        (sums.chosen_B.sum() - 2 * sums.rejected_B[[0, 1, 3]].sum()).backward()
        gradients = [p.grad for p in policy.parameters() if p.grad is not None]
        found.append([*sums, *gradients, torch.tensor([each[2:] for each in encoded])])
    assert len(found[0]) == len(found[1])
    for padded, flat in zip(*found, strict=True):
        torch.testing.assert_close(flat, padded, rtol=1e-4, atol=1e-5)


def test_the_model_of_flat_rows_still_generates_as_it_did(tiny_model: Path) -> None:
    ids, said = torch.tensor([[5, 9, 3, 7]]), []
    for is_flat in (False, True):
        model, tokenizer = load_model(tiny_model, "float32")
        policy = Policy(model, tokenizer, rank=4, alpha=8.0, layers=1, targets=("q_proj",), seed=0, is_flat=is_flat)
        said.append(policy.model.generate(ids, max_new_tokens=8, do_sample=False).tolist())  # type: ignore[operator]
    assert said[0] == said[1]


def test_only_positions_that_predict_a_completion_get_logits() -> None:
    rows = pack([tokens(50, 3, 2), tokens(9, 1, 0)])
    assert len(rows.source_M) == 3 + 2 + 1
    assert rows.side_M.tolist() == [0, 0, 0, 2, 2, 1]


def test_an_answer_that_ended_by_itself_carries_the_end_token_and_a_cut_one_does_not(tiny_model: Path) -> None:
    _, tokenizer = load_model(tiny_model, "float32")
    ended = completion_tokens(tokenizer, completion("hi"), 100)
    cut = completion_tokens(tokenizer, completion("hi", finish_reason="length"), 100)
    clipped = completion_tokens(tokenizer, msgspec.structs.replace(completion("hi"), is_clipped=True), 100)
    assert ended == (*cut, tokenizer.eos_token_id)
    assert clipped == cut, "a stop string of one request is no end that the model should learn"
    assert len(completion_tokens(tokenizer, completion("a long answer"), 5)) == 5


def test_a_long_prompt_keeps_its_end_where_the_question_and_the_answers_start_are(tiny_model: Path) -> None:
    _, tokenizer = load_model(tiny_model, "float32")
    prompt = (Message(role="user", content="x" * 300),)
    whole, cut = prompt_tokens(tokenizer, prompt, 10_000), prompt_tokens(tokenizer, prompt, 20)
    assert len(whole) > 300 and cut == whole[-20:]


def test_a_prompt_with_tools_is_trained_on_token_for_token_as_it_was_served(tmp_path: Path) -> None:
    make_tool_model(7, tmp_path)
    _, tokenizer = load_model(tmp_path, "float32")
    call = ToolCall("call_1", "get_weather", '{"city": "Bern", "days": 2}')
    asked = offered(tool(), tool("set_mood"), text="How is Bern?")
    turn = (Message("assistant", "", tool_calls=(call,)), Message("tool", "sunny", tool_call_id="call_1"))
    for prompt in (asked, (*asked, *turn), (Message("system", "Be brief.", tools=asked[0].tools), *turn)):
        served = PromptEncoder(tokenizer, None).encode(prompt)
        event = decode(encode(structs.replace(verdict(1), prompt=prompt)))
        assert isinstance(event, PreferenceRecorded)
        assert list(prompt_tokens(tokenizer, event.prompt, 10_000)) == served
    assert prompt_tokens(tokenizer, offered(), 10_000) != prompt_tokens(tokenizer, asked, 10_000)


def test_a_call_is_trained_on_as_the_model_wrote_it(tiny_model: Path) -> None:
    _, tokenizer = load_model(tiny_model, "float32")
    text = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>'
    ids = completion_tokens(tokenizer, completion(text), 1000)
    assert tokenizer.decode(ids[:-1]) == text
    assert ids[-1] == tokenizer.eos_token_id


def test_micro_batches_stay_within_the_budget_and_hold_every_pair_once() -> None:
    lengths = [30, 10, 200, 12, 31, 9]
    groups = list(micro_batches(lengths, 64))
    assert sorted(index for group in groups for index in group) == list(range(6))
    assert all(len(g) == 1 or max(lengths[i] for i in g) * len(g) <= 64 for g in groups)
    assert [2] in groups  # longer than the budget: alone


def test_a_row_is_as_long_as_prompt_and_both_answers() -> None:
    assert PairTokens((1, 2), (3,), (4, 5)).total == 5
