"""Hugging Face's Trainer, Accelerate and peft."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from helpers import assert_same_bits, snapshot
from peft import LoraConfig, get_peft_model
from recorder import Recorder
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from fused_optim import AdaBelief, AdamaxW, AdamW

pytestmark = [pytest.mark.stacks, pytest.mark.filterwarnings("default")]


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2))


def rows(n: int = 24) -> torch.Tensor:
    return torch.randint(0, 32, (n, 8), generator=torch.Generator().manual_seed(1))


class Watch(TrainerCallback):  # type: ignore[misc]
    """Records what the trainer's optimizer is given."""

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.recorder = Recorder(getattr(optimizer, "optimizer", optimizer))


def hf_trainer(folder: Path, way: str, flatten: bool, **options: Any) -> Any:
    arguments = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=2, save_steps=3, use_cpu=True, report_to=[],
        disable_tqdm=True, learning_rate=0.01, max_grad_norm=0.5, warmup_steps=2, **options,
    )  # fmt: skip
    model = gpt2()
    if way == "optimizers":
        optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.1, flatten=flatten)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        given: dict[str, Any] = {"optimizers": (optimizer, schedule)}
    else:
        given = {"optimizer_cls_and_kwargs": (AdaBelief, {"lr": 0.01, "flatten": flatten})}
    data = [{"input_ids": row, "labels": row} for row in rows()]
    return Trainer(model, arguments, train_dataset=data, **given)


@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "bf16": True}], ids=["", "bf16"])
def test_trainer(way: str, options: dict[str, Any], flatten: bool, tmp_path: Path) -> None:
    """Trained in one go, and on from the checkpoint in the middle: the same weights, and eager's."""
    whole, watch = hf_trainer(tmp_path / "whole", way, flatten, **options), Watch()
    whole.add_callback(watch)
    whole.train()
    watch.recorder.check(steps=6)
    resumed = hf_trainer(tmp_path / "resumed", way, flatten, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert_same_bits(list(resumed.model.parameters()), list(whole.model.parameters()))
    assert_same_bits(resumed.optimizer.state_dict(), whole.optimizer.state_dict())


def test_trainer_with_lora(tmp_path: Path) -> None:
    """Adapters alone are trained, with two groups of different decay; the base model stays."""
    base = gpt2()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    lora = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    model = get_peft_model(base, lora)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [(n, p) for n, p in adapters.items() if "lora_A" in n], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in adapters.items() if "lora_B" in n], "lr": 0.16},
    ]
    optimizer = AdamW(groups, lr=0.01)
    recorder = Recorder(optimizer)
    arguments = TrainingArguments(str(tmp_path), max_steps=3, use_cpu=True, report_to=[], disable_tqdm=True)
    data = [{"input_ids": row, "labels": row} for row in rows()]
    Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()
    recorder.check(steps=3)
    assert set(optimizer.state) == set(adapters.values())
    for name, p in model.base_model.model.named_parameters():
        if "lora" not in name:
            assert torch.equal(p, before[name.replace("base_layer.", "")]), name
    merged = model.merge_and_unload()
    assert not torch.equal(
        merged.transformer.h[0].attn.c_attn.weight, before["transformer.h.0.attn.c_attn.weight"]
    )


def accelerated(accelerator: Any, flatten: bool) -> tuple[Any, ...]:
    model = gpt2()
    optimizer = AdamaxW(model.named_parameters(), lr=0.01, flatten=flatten)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    batches = torch.utils.data.DataLoader(rows(16), batch_size=2)
    return optimizer, *accelerator.prepare(model, optimizer, batches, schedule)


@pytest.fixture
def fresh_state() -> Iterator[None]:
    """Accelerate keeps the precision of a process's first Accelerator."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_state")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str, flatten: bool, tmp_path: Path) -> None:
    """Accumulation and clipping; the state of the middle is loaded into a new model, which goes on alike."""
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)

    def train(prepared: tuple[Any, ...], first: int, last: int) -> None:
        _, model, optimizer, batches, schedule = prepared
        for number, batch in enumerate(batches):
            if not first <= number < last:
                continue
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=batch, labels=batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    whole = accelerated(accelerator, flatten)
    recorder = Recorder(whole[0])
    train(whole, 0, 4)
    accelerator.save_state(str(tmp_path))
    train(whole, 4, 8)
    recorder.check(steps=4)
    accelerator.free_memory()
    resumed = accelerated(accelerator, flatten)
    accelerator.load_state(str(tmp_path))
    train(resumed, 4, 8)
    assert_same_bits(list(resumed[1].parameters()), list(whole[1].parameters()))
    assert_same_bits(snapshot(resumed[0]), snapshot(whole[0]))
    accelerator.free_memory()


@pytest.mark.usefixtures("fresh_state")
def test_accelerate_skips_a_step(flatten: bool) -> None:
    """On a CPU an Accelerator makes no scaler, so its optimizer is given one."""
    Accelerator(cpu=True)
    model = torch.nn.Linear(3, 2)
    optimizer = AdaBelief(model.parameters(), flatten=flatten)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
    for number in range(4):
        before = snapshot(optimizer)
        scaler.scale(model(torch.ones(1, 3)).sum() * (torch.inf if number == 2 else 1)).backward()
        wrapped.step()
        wrapped.zero_grad()
        assert wrapped.step_was_skipped == (number == 2)
        after = snapshot(optimizer)
        if number == 2:
            assert_same_bits([after["params"], after["states"]], [before["params"], before["states"]])
    assert [int(s["step"]) for s in after["states"]] == [3, 3]
