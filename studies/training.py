"""Train the demo's GPT and a small convolutional net in every format, seed by seed.

Runs of one seed start from the same weights and see the same batches, so formats are compared
by paired differences of the validation loss. A parameter in bfloat16 is widened for the forward
pass, and its gradient arrives in bfloat16: all the arithmetic is in float32, and runs differ in
nothing but how parameters, gradients and states are stored.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from examples.train_gpt import FUSED, GPT, Config, decays, get_batch, load_data, make_schedule

RESULTS = Path(__file__).parent / "results" / "training.json"

RULES = {"adabelief": "AdaBelief", "adamaxw": "AdamaxW"}
REFERENCE = "fp32"
FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    REFERENCE: (torch.float32, {}),
    "bf16 states": (torch.float32, {"state_format": "bf16"}),
    "split16+bf16": (torch.bfloat16, {"master_weights": "split16", "state_format": "bf16"}),
    "split8+8bit": (torch.bfloat16, {"master_weights": "split8", "state_format": "8bit"}),
}
"""By name: the dtype of parameters and gradients, and the optimizer's arguments."""

EVALUATIONS = 10
"""The validation loss is the mean of the last so many evaluations, one every ``EVAL_EVERY`` steps."""
EVAL_EVERY = 25
NOISE = 0.5
"""Standard deviation of the noise on digits, whose pixels lie in [0, 1]: without noise the loss
goes to zero and its relative differences say nothing."""


@dataclass(frozen=True)
class Run:
    """One training run; it depends on nothing else."""

    task: str
    rule: str
    format: str
    seed: int
    steps: int

    @property
    def title(self) -> str:
        return f"{self.task} {RULES[self.rule]} {self.format} seed {self.seed}"


@dataclass(frozen=True)
class Task:
    """A model and its data.

    Attributes:
        make_model: to be called after seeding.
        batch: the inputs and targets of (seed, step).
        validation: inputs and targets, the same every time.
        config: schedule, weight decay, gradient clipping.
    """

    make_model: Callable[[], nn.Module]
    batch: Callable[[int, int], tuple[Tensor, Tensor]]
    validation: list[tuple[Tensor, Tensor]]
    config: Config


def gpt_task(rule: str, steps: int) -> Task:
    """The demo's GPT on the demo's data, smaller."""
    config = Config(optimizer=rule, steps=steps, layers=2, width=64, context=64, batch_size=4, device="cpu")
    train_data, val_data = load_data()
    wide = Config(context=config.context, batch_size=128)
    return Task(
        lambda: GPT(config),
        lambda seed, step: get_batch(train_data, config, 1 + seed, step),
        [get_batch(val_data, wide, 0, i) for i in range(2)],
        config,
    )


def digits_task(rule: str, steps: int) -> Task:
    """scikit-learn's digits under noise and a convolutional net; a third is held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    labels = torch.tensor(data.target)
    generator = torch.Generator().manual_seed(0)
    val, train = torch.randperm(len(images), generator=generator).split([600, len(images) - 600])

    def noisy(chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        clean = images[chosen]
        return clean + NOISE * torch.randn(clean.shape, generator=generator), labels[chosen]

    def batch(seed: int, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed((1 + seed) * 1_000_000 + step)
        return noisy(train[torch.randint(len(train), (64,), generator=generator)], generator)

    def make_model() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 10),
        )

    config = Config(optimizer=rule, steps=steps, device="cpu")
    return Task(make_model, batch, [noisy(val, generator) for _ in range(4)], config)


TASKS = {"gpt": gpt_task, "digits": digits_task}
TITLES = {"gpt": "GPT", "digits": "digits"}


def train(run: Run) -> dict[str, Any]:
    """Make one run; its validation losses as ``[[step, loss], ...]``."""
    start = time.perf_counter()
    task = TASKS[run.task](run.rule, run.steps)
    dtype, options = FORMATS[run.format]
    torch.manual_seed(run.seed)
    model = task.make_model()
    # Every format starts from weights that bfloat16 can hold.
    params = {
        name: p.detach().to(torch.bfloat16).to(dtype).requires_grad_() for name, p in model.named_parameters()
    }
    optimizer = FUSED[run.rule](
        list(params.items()),
        lr=make_schedule(task.config),
        weight_decay=task.config.weight_decay,
        weight_decay_mask=decays,
        backend="cpu",
        **options,
    )

    def get_loss(inputs: Tensor, targets: Tensor) -> Tensor:
        wide = {name: p.float() for name, p in params.items()}
        logits: Tensor = functional_call(model, wide, inputs)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.flatten())

    @torch.no_grad()
    def evaluate() -> float:
        return torch.stack([get_loss(*batch) for batch in task.validation]).mean().item()

    losses = [(0, evaluate())]
    tail = run.steps - EVAL_EVERY * (EVALUATIONS - 1)
    for step in range(run.steps):
        optimizer.zero_grad()
        get_loss(*task.batch(run.seed, step)).backward()
        nn.utils.clip_grad_norm_(params.values(), task.config.clip)
        optimizer.step()
        done = step + 1
        if done % 100 == 0 or (done >= tail and (done - tail) % EVAL_EVERY == 0):
            losses.append((done, evaluate()))
    return {**asdict(run), "val": losses, "seconds": time.perf_counter() - start}


def _start_worker() -> None:
    torch.set_num_threads(1)
    os.nice(10)


def load(path: Path) -> dict[Run, dict[str, Any]]:
    """The finished runs of a file."""
    records = json.loads(path.read_text())["runs"] if path.exists() else []
    return {Run(**{key: record[key] for key in Run.__dataclass_fields__}): record for record in records}


def save(path: Path, runs: dict[Run, dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    lines = ",\n".join(json.dumps(record) for record in runs.values())
    unfinished.write_text(f'{{"torch": "{torch.__version__}", "runs": [\n{lines}\n]}}\n')
    os.replace(unfinished, path)


def plan(seeds: dict[str, int], steps: int) -> Iterator[Run]:
    """All runs, seed by seed, so that an interrupted study is a whole study of fewer seeds."""
    for seed in range(max(seeds.values())):
        for task, n in seeds.items():
            for rule in RULES:
                for name in FORMATS:
                    if seed < n:
                        yield Run(task, rule, name, seed, steps)


def study(seeds: dict[str, int], steps: int, workers: int, path: Path = RESULTS) -> dict[Run, dict[str, Any]]:
    """Make the runs that ``path`` does not have yet, each saved as it ends."""
    runs = load(path)
    missing = [run for run in plan(seeds, steps) if run not in runs]
    context = get_context("spawn")
    with (
        ProcessPoolExecutor(workers, context, _start_worker) as pool,
        tqdm(total=len(missing), desc="runs", smoothing=0, mininterval=5) as bar,
    ):
        for future in as_completed([pool.submit(train, run) for run in missing]):
            record = future.result()
            runs |= load(path)
            runs[Run(**{key: record[key] for key in Run.__dataclass_fields__})] = record
            save(path, runs)
            bar.update()
    return runs


def final_loss(record: dict[str, Any]) -> float:
    """The mean of the last evaluations."""
    losses = [loss for _, loss in record["val"][-EVALUATIONS:]]
    return fmean(losses)
