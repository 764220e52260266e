"""Hugging Face's Trainer, Accelerate and peft."""

from pathlib import Path
from typing import Any

import pytest
import torch
from recorder import Recorder
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from fused_optim import AdaBelief, AdamW

pytestmark = [pytest.mark.stacks, pytest.mark.filterwarnings("default")]


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2))


def tokens() -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(0, 32, (24, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in rows]


class Watch(TrainerCallback):  # type: ignore[misc]
    """Records what the trainer's optimizer is given."""

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.recorder = Recorder(getattr(optimizer, "optimizer", optimizer))


def hf_trainer(folder: Path, way: str, flatten: bool, **options: Any) -> Any:
    arguments = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=2, save_steps=3, logging_steps=1, use_cpu=True,
        report_to=[], disable_tqdm=True, learning_rate=0.01, max_grad_norm=0.5, warmup_steps=2, **options,
    )  # fmt: skip
    model, kwargs = gpt2(), {"flatten": flatten}
    if way == "optimizers":
        optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.1, **kwargs)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        given: dict[str, Any] = {"optimizers": (optimizer, schedule)}
    else:
        given = {"optimizer_cls_and_kwargs": (AdaBelief, {"lr": 0.01, **kwargs})}
    return Trainer(model, arguments, train_dataset=tokens(), **given)


@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
def test_trainer(way: str, flatten: bool, tmp_path: Path) -> None:
    """Trained in one go, and from the checkpoint in the middle: the same weights, and eager's."""
    for options in ({}, {"gradient_accumulation_steps": 2, "bf16": True}):
        whole, watch = hf_trainer(tmp_path / "whole", way, flatten, **options), Watch()
        whole.add_callback(watch)
        whole.train()
        watch.recorder.check(steps=6)
        resumed = hf_trainer(tmp_path / "resumed", way, flatten, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
        assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))
