"""The engine computes what transformers computes: tokens, log-probs, versions, whatever shares the batch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal
from unittest.mock import AsyncMock

import jsonschema
import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from serving.config import BaseConfig
from serving.engine import ChunkStream
from serving.errors import InvalidRequest, Overloaded, VersionRefused
from serving.product import packed
from serving.safety import OutputFilter
from serving.scheduler import Copy, Plan
from serving.transformers_engine import TransformersEngine
from serving.wire import Chunk, ToolUse
from telemetry.events import Tool
from telemetry.manifest import ADAPTER_FILE, base_digest, read_version
from tests.tool_model import SCHEMAS, make_tool_model, offered, tool
from tests.unit.serving.kit import (
    KEY,
    Reference,
    adapter_tensors,
    answer,
    ids_of,
    last_of,
    publish,
    request,
    text_of,
)

# float32, whatever this processor multiplies best: only there are tokens equal and not merely near
OPTIONS = BaseConfig(
    dtype="float32", threads=1, max_context=256, slots=4, chunk_tokens=8, idle_chunk_tokens=16, max_queue=32
)


async def started(model: Path, options: BaseConfig = OPTIONS) -> TransformersEngine:
    engine = TransformersEngine(model, base_digest(model), "tiny", options, OutputFilter(()))
    await engine.start()
    return engine


@pytest.fixture(params=["float32", "halves"])
def model(request: pytest.FixtureRequest, tiny_model: Path, tiny_halves: Path) -> Path:
    """Of both kinds: weights that are multiplied as they are, and weights that the engine packs."""
    is_packed = request.param == "halves"
    weights = load_file((tiny_halves if is_packed else tiny_model) / "model.safetensors")
    if is_packed and "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this processor has no FBGEMM")
    assert all(bool(packed(weight, None)) == is_packed for weight in weights.values() if weight.dim() == 2)
    return tiny_halves if is_packed else tiny_model


@pytest.fixture
async def engine(model: Path) -> AsyncIterator[TransformersEngine]:
    built = await started(model)
    yield built
    await built.close()


async def load(engine: TransformersEngine, model: Path, state: Path, sequence: int, rank: int = 4) -> str:
    version, folder = publish(state, model, sequence, rank=rank)
    await engine.load(version, folder, read_version(folder, KEY))
    return version


async def test_base_answers_greedily_as_transformers_does(engine: TransformersEngine, model: Path) -> None:
    prompt = "a prompt of more than one chunk, so that it is read in several steps"
    chunks = await answer(engine, request(engine.base_version, prompt, max_tokens=20))
    assert ids_of(chunks) == Reference(model).greedy(prompt, 20)


async def test_each_version_of_a_mixed_batch_answers_as_its_merged_model(
    engine: TransformersEngine, model: Path, tmp_path: Path
) -> None:
    versions: dict[str, Reference] = {engine.base_version: Reference(model)}
    for sequence, rank in ((1, 4), (2, 8), (3, 16)):
        version = await load(engine, model, tmp_path, sequence, rank)
        versions[version] = Reference(model, sequence, rank)
    asked = [(v, f"question {i} " * (1 + 2 * i)) for i in range(3) for v in versions]
    answers = await asyncio.gather(*(answer(engine, request(v, p, max_tokens=15)) for v, p in asked))
    for (version, prompt), chunks in zip(asked, answers, strict=True):
        assert ids_of(chunks) == versions[version].greedy(prompt, 15)
    assert len({tuple(ids_of(chunks)) for chunks in answers}) > 8


async def test_logprobs_are_those_of_transformers_before_temperature(engine: TransformersEngine, model: Path) -> None:
    wanted = request(engine.base_version, temperature=1.3, top_p=0.9, seed=3, top_logprobs=4)
    chunks = await answer(engine, wanted)
    reference = Reference(model)
    prompt, made = reference.prompt_ids("Hello there"), ids_of(chunks)
    expected = reference.logprobs(prompt + made)[len(prompt) - 1 :]
    for place, token in enumerate(t for chunk in chunks for t in chunk.tokens):
        assert token.logprob == pytest.approx(float(expected[place, token.token_id]), abs=1e-4)
        likeliest = expected[place].topk(4).values.tolist()
        assert [top.logprob for top in token.top] == pytest.approx(likeliest, abs=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
async def test_in_bfloat16_log_probs_are_near_those_of_transformers(
    dtype: Literal["bfloat16", "auto"], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    engine = await started(model, msgspec.structs.replace(OPTIONS, dtype=dtype, chunk_tokens=16))
    version = await load(engine, model, tmp_path, 1)
    asked = [(engine.base_version, None, "the base"), (version, 1, "an adapter, and more tokens than one chunk takes")]
    answers = await asyncio.gather(*(answer(engine, request(v, prompt)) for v, _, prompt in asked))
    await engine.close()
    for (_, seed, prompt), chunks in zip(asked, answers, strict=True):
        said = [token.logprob for chunk in chunks for token in chunk.tokens]
        assert said == pytest.approx(expected_logprobs(Reference(model, seed), prompt, ids_of(chunks)), abs=0.3)
        assert said != pytest.approx(expected_logprobs(Reference(model, 2), prompt, ids_of(chunks)), abs=0.3)


def expected_logprobs(reference: Reference, prompt: str, made: list[int]) -> list[float]:
    """Of each token of the answer ``made``."""
    ids = reference.prompt_ids(prompt)
    table = reference.logprobs(ids + made)[len(ids) - 1 :]
    return [float(table[place, token]) for place, token in enumerate(made)]


async def test_a_seeded_answer_does_not_depend_on_what_shares_its_batch(engine: TransformersEngine) -> None:
    wanted = request(engine.base_version, "alone", temperature=1.0, seed=11)
    alone = text_of(await answer(engine, wanted))
    others = [request(engine.base_version, f"other {i}", temperature=1.0) for i in range(6)]
    together = await asyncio.gather(*(answer(engine, one) for one in [*others, wanted]))
    assert text_of(together[-1]) == alone


async def test_completions_of_one_prompt_share_its_reading(engine: TransformersEngine, model: Path) -> None:
    prompt = "one prompt, three greedy answers"
    chunks = await answer(engine, request(engine.base_version, prompt, n=3))
    expected = Reference(model).greedy(prompt, 12)
    assert [ids_of(chunks, i) for i in range(3)] == [expected] * 3
    counted = [last_of(chunks, i) for i in range(3)]
    assert [last.cached_tokens for last in counted] == [0, counted[0].prompt_tokens, counted[0].prompt_tokens]


async def test_a_prompt_seen_before_is_not_read_again_and_answers_the_same(engine: TransformersEngine) -> None:
    wanted = request(engine.base_version, "a long question that was asked before")
    first, second = await answer(engine, wanted), await answer(engine, wanted)
    assert (last_of(first).cached_tokens, last_of(second).cached_tokens) == (
        0,
        last_of(second).prompt_tokens - 1,
    )
    assert text_of(first) == text_of(second)


async def test_the_prefix_cache_never_crosses_versions(engine: TransformersEngine, model: Path, tmp_path: Path) -> None:
    prompt = "the same long question to every version"
    for sequence in (1, 2):
        version = await load(engine, model, tmp_path, sequence)
        chunks = await answer(engine, request(version, prompt))
        assert ids_of(chunks) == Reference(model, sequence).greedy(prompt, 12)
    mine = await answer(engine, request(engine.base_version, prompt))
    assert last_of(mine).cached_tokens == 0
    assert ids_of(mine) == Reference(model).greedy(prompt, 12)


async def test_a_reused_slot_does_not_remember_its_last_version(model: Path, tmp_path: Path) -> None:
    engine = await started(model, msgspec.structs.replace(OPTIONS, slots=1))
    prompt = "the same long question to every version"
    for sequence, rank in ((1, 16), (2, 4), (3, 8)):
        version = await load(engine, model, tmp_path, sequence, rank)
        chunks = await answer(engine, request(version, prompt))
        assert ids_of(chunks) == Reference(model, sequence, rank).greedy(prompt, 12)
        await engine.unload(version)
    await engine.close()


async def test_more_requests_than_places_are_all_answered(model: Path) -> None:
    engine = await started(model, msgspec.structs.replace(OPTIONS, max_batch=3, max_queue=40))
    reference = Reference(model)
    prompts = [f"{'x' * (i % 7)} number {i}" for i in range(20)]
    answers = await asyncio.gather(*(answer(engine, request(engine.base_version, p)) for p in prompts))
    assert [ids_of(chunks) for chunks in answers] == [reference.greedy(p, 12) for p in prompts]
    await engine.close()


async def test_a_full_queue_refuses_at_once(model: Path) -> None:
    engine = await started(model, msgspec.structs.replace(OPTIONS, max_batch=1, max_queue=2))
    streams = []
    with pytest.raises(Overloaded):
        for _ in range(10):
            streams.append(await engine.submit(request(engine.base_version, max_tokens=200)))
    for stream in streams:
        await stream.aclose()
    await engine.close()


async def test_more_completions_than_places_are_refused(model: Path) -> None:
    engine = await started(model, msgspec.structs.replace(OPTIONS, max_batch=2))
    with pytest.raises(InvalidRequest, match="n: at most 2"):
        await engine.submit(request(engine.base_version, n=3))
    await engine.close()


@pytest.mark.parametrize(
    "fault", ["rank above the slots'", "unknown module", "wrong shape", "not finite", "no weights"]
)
async def test_an_adapter_that_does_not_fit_is_refused_and_its_slot_is_free(
    engine: TransformersEngine, model: Path, tmp_path: Path, fault: str
) -> None:
    rank = 32 if fault.startswith("rank") else 4
    version, folder = publish(tmp_path, model, 1, rank=rank)
    tensors = adapter_tensors(model, 1, rank)
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    match fault:
        case "unknown module":
            tensors["model.layers.9.self_attn.q_proj.lora_A.weight"] = tensors.pop(name)
        case "wrong shape":
            tensors[name] = tensors[name][:, :5].contiguous()
        case "not finite":
            tensors[name] = tensors[name] * torch.nan
        case "no weights":
            tensors = {}
    manifest = read_version(folder, KEY)
    save_file(tensors, folder / ADAPTER_FILE)
    with pytest.raises(VersionRefused):
        await engine.load(version, folder, manifest)
    status = engine.status()
    assert (status.versions, status.free_slots) == ((engine.base_version,), 4)
    assert version in status.failed
    good = await load(engine, model, tmp_path, 2)
    assert ids_of(await answer(engine, request(good))) == Reference(model, 2).greedy("Hello there", 12)


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_what_is_no_number_in_one_answer_reaches_no_other(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cancelled: bool
) -> None:
    """Its keys and values lie in a row that a shorter sequence takes next, beside a longer one that still runs."""
    engine = await started(model, msgspec.structs.replace(OPTIONS, max_batch=2))
    version, folder = publish(tmp_path, model, 1, size=1e20)
    manifest, base, end = read_version(folder, KEY), engine.base_version, Reference(model).tokenizer.eos_token_id
    with pytest.raises(VersionRefused, match="not_finite"):
        await engine.load(version, folder, manifest)
    monkeypatch.setattr(engine, "_warm", AsyncMock())  # one that breaks only later, where it is warm already
    await engine.load(version, folder, manifest)
    asked = [
        request(base, "word " * 5, max_tokens=180, logit_bias={end: -100.0}),
        request(version, "another " * 15),
        request(base),  # waits for the place of the one before
    ]
    with engine._wake:  # the engine sees them together
        streams = [await engine.submit(one) for one in asked]
        broken, advance = streams[1]._ticket, engine._scheduler.advance  # type: ignore[attr-defined]

        def advance_or_cancel(plan: Plan) -> list[Copy]:
            broken.is_cancelled |= is_cancelled and any(w.sequence.slot and w.stop > 90 for w in plan.work)
            return advance(plan)

        monkeypatch.setattr(engine._scheduler, "advance", advance_or_cancel)
    longest, failed, short = await asyncio.gather(*map(_all_of, streams))
    assert (failed[-1].finish_reason, failed[-1].error) == (
        ("cancelled", "") if is_cancelled else ("error", "not_finite")
    )
    assert ids_of(short) == Reference(model).greedy("Hello there", 12)
    assert len(ids_of(longest)) == 180
    await engine.close()


async def test_the_check_at_the_start_leaves_nothing_behind(engine: TransformersEngine) -> None:
    """What a refused way of computing wrote may be no numbers."""
    assert not engine._runner.kv.keys.any() and not engine._runner.kv.values.any()


async def _all_of(stream: ChunkStream) -> list[Chunk]:
    return [chunk async for chunk in stream]


async def test_an_idle_engine_sleeps(engine: TransformersEngine) -> None:
    await answer(engine, request(engine.base_version))
    import time

    before = time.process_time()
    await asyncio.sleep(0.3)
    assert time.process_time() - before < 0.1


SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["calm", "lively"]}, "stars": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["mood", "stars"],
    "additionalProperties": False,
}


async def test_a_schema_holds_even_for_a_model_of_noise(engine: TransformersEngine) -> None:
    schema = json.dumps(SCHEMA)
    wish = request(engine.base_version, json_schema=schema, max_tokens=100, temperature=1.5, top_p=1.0, n=3)
    chunks = await answer(engine, wish)
    for index in range(3):
        jsonschema.validate(json.loads(text_of(chunks, index)), SCHEMA)
        assert last_of(chunks, index).finish_reason == "stop"


async def test_an_answer_that_a_stop_string_ended_is_clipped(engine: TransformersEngine) -> None:
    whole = await answer(engine, request(engine.base_version, "as ever", max_tokens=16))
    text = text_of(whole)
    stop = text[len(text) // 2 :][:2]
    clipped = await answer(engine, request(engine.base_version, "as ever", max_tokens=16, stop=(stop,)))
    assert text_of(clipped) == text[: text.find(stop)]
    assert (last_of(clipped).finish_reason, last_of(clipped).is_clipped) == ("stop", True)
    assert (last_of(whole).finish_reason, last_of(whole).is_clipped) == ("length", False)


@pytest.mark.parametrize("use", [{}, {"is_parallel": False}, {"names": ("set_mood",), "is_parallel": False}])
async def test_calls_that_must_come_fit_their_schemas_even_for_a_model_of_noise(
    tmp_path: Path, use: dict[str, Any]
) -> None:
    make_tool_model(7, tmp_path)
    engine = await started(tmp_path, msgspec.structs.replace(OPTIONS, max_context=2048))
    fields = {"names": ("get_weather", "set_mood"), "is_required": True} | use
    wish = msgspec.structs.replace(
        request(engine.base_version, max_tokens=900, temperature=1.5, top_p=1.0, seed=4, n=4),
        messages=offered(tool(), tool("set_mood")),
        tool_use=ToolUse(**fields),
    )
    chunks = await answer(engine, wish)
    await engine.close()
    for index in range(4):
        calls = [call for chunk in chunks if chunk.index == index for call in chunk.tool_calls]
        assert len(calls) >= 1
        assert len(calls) == 1 or "is_parallel" not in use
        assert last_of(chunks, index).finish_reason == "stop"
        for call in calls:
            assert call.name in fields["names"]
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])


async def test_a_schema_that_no_grammar_can_hold_is_refused_where_it_must_be(tmp_path: Path) -> None:
    make_tool_model(7, tmp_path)
    engine = await started(tmp_path, msgspec.structs.replace(OPTIONS, max_context=2048))
    odd = Tool("odd", "", '{"type": "object", "properties": {"a": {"type": "nonsense"}}, "required": ["a"]}')
    for is_required in (True, False):
        wish = msgspec.structs.replace(
            request(engine.base_version),
            messages=offered(odd),
            tool_use=ToolUse(("odd",), is_required=is_required),
        )
        if is_required:
            with pytest.raises(InvalidRequest, match="tools: this JSON schema cannot be enforced"):
                await engine.submit(wish)
        else:
            assert await answer(engine, wish), "only offered, it is a description"
    await engine.close()


async def test_a_schema_binds_its_own_row_only(engine: TransformersEngine, model: Path) -> None:
    bound, free = await asyncio.gather(
        answer(engine, request(engine.base_version, json_schema='{"type":"boolean"}', max_tokens=10)),
        answer(engine, request(engine.base_version, "as ever", max_tokens=16)),
    )
    assert text_of(bound) in ("true", "false")
    assert ids_of(free) == Reference(model).greedy("as ever", 16)


@pytest.mark.parametrize("schema", ["[1]", '{"type": "nonsense"}', "{"])
async def test_a_schema_that_is_none_is_refused(engine: TransformersEngine, schema: str) -> None:
    with pytest.raises(InvalidRequest, match="response_format"):
        await engine.submit(request(engine.base_version, json_schema=schema))


async def test_a_token_outside_the_vocabulary_cannot_be_biased(engine: TransformersEngine) -> None:
    with pytest.raises(InvalidRequest, match="logit_bias"):
        await engine.submit(request(engine.base_version, logit_bias={10**6: 1.0}))


async def test_a_banned_token_is_not_said_and_a_wanted_one_is(engine: TransformersEngine) -> None:
    usual = ids_of(await answer(engine, request(engine.base_version, "bias")))
    without = ids_of(await answer(engine, request(engine.base_version, "bias", logit_bias={usual[0]: -100.0})))
    assert usual[0] not in without
    wanted = ids_of(await answer(engine, request(engine.base_version, "bias", logit_bias={7: 100.0})))
    assert wanted == [7] * 12


async def test_log_probs_stay_the_models_own(engine: TransformersEngine, model: Path) -> None:
    chunks = await answer(engine, request(engine.base_version, "bias", logit_bias={7: 100.0}, max_tokens=1))
    reference = Reference(model)
    expected = float(reference.logprobs(reference.prompt_ids("bias"))[-1, 7])
    assert chunks[0].tokens[0].logprob == pytest.approx(expected, abs=1e-3)


async def test_a_penalty_ends_repetition(engine: TransformersEngine) -> None:
    wish = {"logit_bias": {7: 20.0}, "max_tokens": 30}  # would say token 7 for ever
    assert set(ids_of(await answer(engine, request(engine.base_version, **wish)))) == {7}
    punished = ids_of(await answer(engine, request(engine.base_version, frequency_penalty=2.0, **wish)))
    assert set(punished[:5]) == {7}
    assert len(set(punished)) > 1
