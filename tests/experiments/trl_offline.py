"""TRL's DPOTrainer, whole, on the verdicts of a circle: same base, LoRA, β and number of passes, its own loop.

Learning rates are the caller's to try; the rest of TRL's settings are its defaults. Prompts and answers go in as
texts of a conversation, as TRL's documentation has it; a prompt's end is where the chat template puts it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from online_trainer.config import TrainerConfig
from telemetry.events import PreferenceRecorded, decode


def learned_by_trl(
    verdicts: Sequence[bytes], config: TrainerConfig, rate: float, passes: int, seed: int
) -> dict[str, Tensor]:
    """The adapter by the names of ``Policy.tensors``, after ``passes`` over the verdicts that chose a side."""
    base = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    count = base.config.num_hidden_layers
    lora = LoraConfig(
        r=config.rank, lora_alpha=round(config.alpha), target_modules=list(config.targets), lora_dropout=0.0,
        layers_to_transform=list(range(count - config.layers, count)) if config.layers else None,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="tb-trl-") as folder:
        arguments = DPOConfig(
            output_dir=folder, beta=config.beta, learning_rate=rate, num_train_epochs=passes, seed=seed, report_to=[],
            per_device_train_batch_size=config.batch_pairs, bf16=False, use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False, save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = DPOTrainer(
            get_peft_model(base, lora),
            args=arguments,
            train_dataset=Dataset.from_list(rows(verdicts)),
            processing_class=AutoTokenizer.from_pretrained(config.model),
        )
        trainer.train()
        return {
            name.removeprefix("base_model.model.").replace(".default.", "."): parameter.detach().cpu()
            for name, parameter in trainer.model.named_parameters()
            if parameter.requires_grad
        }


def rows(verdicts: Sequence[bytes]) -> list[dict[str, Any]]:
    """TRL's rows of the verdicts that chose a side."""
    events = [event for payload in verdicts if isinstance(event := decode(payload), PreferenceRecorded)]
    return [
        {
            "prompt": [{"role": message.role, "content": message.content} for message in event.prompt],
            "chosen": [{"role": "assistant", "content": event.chosen.text}],
            "rejected": [{"role": "assistant", "content": event.rejected.text}],
        }
        for event in events
        if event.outcome == "chosen_rejected"
    ]
