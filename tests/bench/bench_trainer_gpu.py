"""A step of ours against one of TRL's DPOTrainer on a GPU: ``python -m tests.bench.bench_trainer_gpu``.

As bench_trainer, on models of about half a billion and a billion parameters in bfloat16. Their weights are random (a
step takes as long whatever they are), so that nothing needs to be downloaded. Both sides run at the best settings found
in a first round: TRL over batch sizes, with Liger's kernels or without; ours over token budgets. Neither is compiled
(DECISIONS.md). It needs no Ray, Kafka or Redis.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.models import make_tiny
from online_trainer.batches import PairTokens
from online_trainer.config import TARGETS
from online_trainer.policy import Policy
from tests.bench import record
from tests.bench.bench_trainer import ALPHA, NO_TOKENIZER, RANK, SHAPES, Ours, Theirs, computed, pairs_of, seconds
from tests.bench.gpu_models import MODELS, device, freed, is_gpu

PEAK: Final = 989e12  # dense bfloat16 operations a second of an H100's or H200's datasheet
KERNELS = 20  # shown of a profile
PAIRS, ROUNDS = 32, 3
FULL: Final = 3  # times as many pairs, to see how busy the GPU can be kept
STEP_PAIRS: Final = (1, 4, 16)


class Setting(NamedTuple):
    """How a side is run."""

    size: int  # TRL's batch, our token budget
    autocasts: bool = False
    uses_liger: bool = False

    def __str__(self) -> str:
        words = [str(self.size), *(name for name, is_on in self._asdict().items() if is_on is True)]
        return " ".join(words)


Side = Ours | Theirs


def new_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device()):
        dtype = torch.bfloat16 if is_gpu() else torch.float32
        model: nn.Module = AutoModelForCausalLM.from_config(MODELS[name], dtype=dtype)
    return model


def any_tokenizer() -> Any:
    """TRL wants one, though it is handed tokens."""
    with tempfile.TemporaryDirectory() as folder:
        make_tiny(0, Path(folder) / "tiny")
        return AutoTokenizer.from_pretrained(Path(folder) / "tiny")


def our_side(base: nn.Module, setting: Setting) -> Ours:
    return Ours(copy.deepcopy(base), budget=setting.size)


def their_side(base: nn.Module, setting: Setting) -> Theirs:
    model = copy.deepcopy(base)
    return Theirs(
        model, any_tokenizer(), setting.size, autocasts=setting.autocasts, uses_liger=setting.uses_liger
    )  # fmt: skip


def best(
    what: str, build: Callable[[Setting], Side], settings: Sequence[Setting], pairs: Sequence[PairTokens]
) -> Setting:
    """The setting that takes least time for ``pairs``; one that fails is none."""
    tried: list[tuple[float, Setting]] = []
    for setting in settings:
        with freed():
            try:
                side = build(setting)
                started = time.perf_counter()
                side.step(pairs), side.step(pairs)
                warm = time.perf_counter() - started
                tried.append((min(seconds(partial(side.step, pairs)) for _ in range(2)), setting))
                print(f"# {what} {setting}: {tried[-1][0]:.3f} s, warm after {warm:.1f} s", flush=True)
            except Exception as error:  # noqa: BLE001  # out of memory, or what is not installed
                print(f"# {what} {setting}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            side = None  # type: ignore[assignment]
    return min(tried)[1]


def operations(model: nn.Module, pairs: Sequence[PairTokens]) -> float:
    """Multiplications and additions that a step needs: reference, policy, and the gradient of what goes in.

    The base's weights do not learn, so that their gradient is none; adapters are left out.
    """
    config: Any = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, decoder = size * config.num_attention_heads, model.get_decoder()  # type: ignore[operator]
    linear = sum(
        m.in_features * m.out_features for m in decoder.modules() if type(m) is nn.Linear
    )  # adapters have none
    total = 0.0
    for prompt, chosen, rejected in ((len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs):
        seen = (prompt + chosen) ** 2 / 2 + rejected * prompt + rejected**2 / 2
        total += 3 * 2 * linear * (prompt + chosen + rejected)
        total += 4 * 4 * seen * heads * config.num_hidden_layers  # backward attention is twice forward
        total += 3 * 2 * config.hidden_size * config.vocab_size * (chosen + rejected)
    return total


def ceiling() -> float:
    """Operations a second of one large bfloat16 product."""
    size = 8192 if is_gpu() else 256
    a, b = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))
    a @ b
    return 2 * size**3 / median(seconds(lambda: a @ b) for _ in range(10))


def throughput(
    name: str, base: nn.Module, rounds: int, count: int, settings: dict[str, list[Setting]]
) -> Iterator[dict[str, Any]]:
    limit = ceiling()
    for shape in SHAPES:
        trial = pairs_of(SHAPES[shape], max(1, count // 2), 99)
        chosen = {
            "ours": best("ours", lambda s: our_side(base, s), settings["ours"], trial),
            "TRL": best("TRL", lambda s: their_side(base, s), settings["TRL"], trial),
        }
        ours, theirs = our_side(base, chosen["ours"]), their_side(base, chosen["TRL"])
        found = compare(ours, theirs, shape, rounds, count)
        rate = {what: median(values) for what, values in found.items()}
        detail = {
            "pairs_per_s": rate, "rounds": found, "settings": {side: str(s) for side, s in chosen.items()},
            **computed(trial), "ours_tokens_computed": sum(pair.total for pair in trial),
            "measured_ceiling_tflops": limit / 1e12,
        }  # fmt: skip
        where = f"prompt:response {shape}, a model of {name}'s shape, bfloat16"
        fastest = max(rate["TRL"], rate["TRL, precomputed"])
        yield record.row(f"pairs/s against TRL, {where}", rate["ours"] / rate["TRL"], "×", bar=1.5, better="higher",
                         **detail)  # fmt: skip
        yield record.row(
            f"pairs/s with the reference at hand against TRL, {where}", rate["ours, reference at hand"] / fastest, "×",
            bar=1.5, better="higher", **detail,
        )  # fmt: skip
        rate_of = operations_a_second(ours, pairs_of(SHAPES[shape], FULL * count, 98), rounds)
        yield record.row(
            f"operations needed, as a share of the datasheet's peak, a step of {FULL * count} pairs, {where}",
            rate_of / PEAK, "", bar=0.4, better="higher", of_measured_ceiling=rate_of / limit, **detail,
        )  # fmt: skip
        print_kernels(ours, pairs_of(SHAPES[shape], FULL * count, 98))
        del ours, theirs
        gc.collect()
        settings = {  # for the other shapes, which are shorter, with as much or more at once
            side: [setting, setting._replace(size=2 * setting.size)] for side, setting in chosen.items()
        }
    yield from steps(name, our_side(base, chosen["ours"]), their_side(base, chosen["TRL"]))
    yield memory(name, base, chosen, count)


def compare(ours: Ours, theirs: Theirs, shape: str, rounds: int, count: int) -> dict[str, list[float]]:
    """Pairs a second of each way."""
    found: dict[str, list[float]] = {}
    for number in range(-1, rounds):  # the first one warms up
        pairs = pairs_of(SHAPES[shape], count, 10 + number)
        given = ours.references(pairs)
        acts: dict[str, Callable[[], float]] = {
            "ours": partial(ours.step, pairs),
            "TRL": partial(theirs.step, pairs),
            "ours, reference at hand": partial(ours.step, pairs, given),
            "TRL, precomputed": partial(theirs.step, pairs, is_precomputed=True),
        }
        for what, act in acts.items():
            took = seconds(act)
            if number >= 0:
                found.setdefault(what, []).append(count / took)
    return found


def operations_a_second(ours: Ours, pairs: Sequence[PairTokens], rounds: int) -> float:
    ours.step(pairs)
    return operations(ours.policy.model, pairs) / median(seconds(partial(ours.step, pairs)) for _ in range(rounds))


def print_kernels(ours: Ours, pairs: Sequence[PairTokens]) -> None:
    """Where a step's time goes."""
    if not is_gpu():
        return
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        took = seconds(partial(ours.step, pairs))
    found = sorted(profiled.key_averages(), key=lambda each: -each.self_device_time_total)
    busy = sum(each.self_device_time_total for each in found) / 1e6
    print(f"# a step of {len(pairs)} pairs took {took:.3f} s, kernels {busy:.3f} s", flush=True)
    for each in found[:KERNELS]:
        print(f"#   {each.self_device_time_total / 1e3:7.1f} ms {each.count:5d} × {each.key[:90]}", flush=True)


def steps(name: str, ours: Ours, theirs: Theirs) -> Iterator[dict[str, Any]]:
    for count in STEP_PAIRS:
        mine, others = [], []
        for number in range(6):
            pairs = pairs_of(SHAPES["128:64"], count, 50 + number)
            mine.append(seconds(partial(ours.step, pairs)))
            others.append(seconds(partial(theirs.step, pairs)))
        own, other = median(mine[1:]), median(others[1:])
        yield record.row(
            f"pairs that came → weights that know them, {count} at once, against TRL's step, a model of {name}'s "
            "shape, bfloat16", own / other, "×", bar=0.5, better="lower", ours_s=own, trl_s=other,
        )  # fmt: skip


def memory(name: str, base: nn.Module, chosen: dict[str, Setting], count: int) -> Any:
    """Growth of the allocator's peak in a step above what is loaded."""
    grown = {}
    builders: dict[str, Callable[[], Side]] = {
        "ours": lambda: our_side(base, chosen["ours"]),
        "trl": lambda: their_side(base, chosen["TRL"]),
    }
    for side, build in builders.items():
        with freed():
            built = build()
            built.step(pairs_of(SHAPES["128:64"], 2, 6))
            loaded = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            built.step(pairs_of(SHAPES["128:64"], count, 7))
            grown[f"{side}_mb"] = (torch.cuda.max_memory_allocated() - loaded) >> 20
            built = None  # type: ignore[assignment]
    return record.row(
        f"peak memory of a step of {count} pairs above the loaded model against TRL, a model of {name}'s shape, "
        "bfloat16", grown["ours_mb"] / max(1, grown["trl_mb"]), "×", bar=0.7, better="lower", **grown,
        settings={side: str(s) for side, s in chosen.items()},
    )  # fmt: skip


def agrees(base: nn.Module) -> None:
    """Log-probs and gradients of one flat row against those of padded rows, on this device. Raises RuntimeError."""
    pairs = pairs_of((100, 40), 6, 5)
    found = []
    for is_flat in (False, True):
        policy = Policy(
            copy.deepcopy(base), NO_TOKENIZER, rank=RANK, alpha=ALPHA, layers=0, targets=TARGETS, seed=0,
            is_flat=is_flat,
        )  # fmt: skip
        with torch.no_grad():
            for adapter in policy.adapters.values():
                adapter.lora_B.normal_(0, 0.02, generator=torch.Generator(device()).manual_seed(1))
        encoded = policy.encode(pairs)
        sums = policy.score(encoded).policy
        (sums.chosen_B - sums.rejected_B).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        found.append((torch.cat([*sums]).detach(), gradient))
    (padded, padded_gradient), (flat, flat_gradient) = found
    apart = float(((padded - flat).abs() / padded.abs()).max())
    angle = float(torch.cosine_similarity(padded_gradient, flat_gradient, dim=0))
    print(f"# flat against padded rows: log-probs at most {apart:.2e} apart, gradients at a cosine of {angle:.5f}")
    if not (apart < 1e-2 and angle > 0.99):
        raise RuntimeError("flat and padded rows compute something else")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", choices=list(MODELS), help="default: both that are not tiny")
    parser.add_argument("--short", action="store_true", help="one round and few settings: whether it runs")
    options = parser.parse_args()
    if not is_gpu() and options.model != ["tiny"]:
        parser.error("no CUDA device here; --model tiny --short tries the script on a processor")
    batches, budgets = ((2,), (1024,)) if options.short else ((4, 8), (16_384, 32_768))
    settings = {
        "ours": [Setting(size) for size in budgets],
        "TRL": [
            *(Setting(size, autocasts=True) for size in batches),
            Setting(batches[-1], autocasts=True, uses_liger=True),
        ],
    }
    rows: list[Any] = []
    for name in options.model or ["Llama-3.2-1B", "Qwen2.5-0.5B"]:
        with freed():
            base = new_model(name)
            agrees(base)
            rounds, count = (1, 2) if options.short else (ROUNDS, PAIRS)
            for row in throughput(name, base, rounds, count, settings):
                rows.append(row)
                record.save("trainer_gpu", "python -m tests.bench.bench_trainer_gpu", rows)  # what is there, is there
                if out := os.environ.get("OUT"):
                    (Path(out) / "trainer_gpu.json").write_text((record.RESULTS / "trainer_gpu.json").read_text())


if __name__ == "__main__":
    main()
