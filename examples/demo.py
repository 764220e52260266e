"""Train a small GPT with fused AdaBelief and AdamaxW, then time their steps.

    python examples/demo.py

Writes ``demo_output/demo.png``.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from train_gpt import GPT, Config, History, get_batch, get_loss, load_data, train

from fused_optim import AdaBelief, AdamaxW
from fused_optim.backends import select

FUSED: dict[str, type[AdaBelief | AdamaxW]] = {"AdaBelief": AdaBelief, "AdamaxW": AdamaxW}
TORCH = "torch AdamW(fused=True)"
COLORS = {"AdaBelief": "tab:blue", "AdamaxW": "tab:orange"}
MARKERS = {"AdaBelief": "o", "AdamaxW": "x"}


def backend_name(device: str) -> str:
    """The backend that ``backend=None`` takes on a device."""
    return select(None, torch.device(device)).name


def device_name(device: str) -> str:
    """What a reader calls the device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, threads: {torch.get_num_threads()}"


def fill_gradients(model: nn.Module, data: Tensor, config: Config, step: int) -> None:
    """Give every parameter the gradient of one batch."""
    model.zero_grad()
    get_loss(model, *get_batch(data, config, config.seed, step)).backward()


def set_gradients(params: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Give each parameter a copy of its source's gradient."""
    for p, source in zip(params, sources):
        p.grad = None if source.grad is None else source.grad.clone()


def check_equal(config: Config, steps: int = 5) -> None:
    """Raise unless fused steps and eager ones give the same parameters, bit for bit."""
    data = load_data()[0].to(config.device)
    for name, optimizer_class in FUSED.items():
        fused_model = GPT(config).to(config.device)
        eager_model = copy.deepcopy(fused_model)
        fused = optimizer_class(fused_model.parameters(), weight_decay=0.1)
        eager = optimizer_class(eager_model.parameters(), weight_decay=0.1, backend="eager")
        for step in range(steps):
            fill_gradients(fused_model, data, config, step)
            # Not a second backward pass, which on a GPU may differ from the first.
            set_gradients(eager_model.parameters(), fused_model.parameters())
            fused.step()
            eager.step()
        for (parameter, p), q in zip(fused_model.named_parameters(), eager_model.parameters()):
            if not torch.equal(p, q):
                backend = backend_name(config.device)
                raise AssertionError(f"{name}: {parameter} differs between backends {backend} and eager")


def time_steps(config: Config, repeats: int = 30) -> dict[str, float]:
    """Median milliseconds of ``optimizer.step()``, by optimizer.

    Args:
        config: what to build the model from, and the device.
        repeats: steps of each optimizer, in turns, so that a busy moment hits all alike.
    """
    model = GPT(config).to(config.device)
    fill_gradients(model, load_data()[0].to(config.device), config, step=0)

    def steps_of(make: Callable[..., torch.optim.Optimizer], **options: object) -> Callable[[], object]:
        params = [p.detach().clone().requires_grad_() for p in model.parameters()]
        set_gradients(params, model.parameters())
        return make(params, weight_decay=0.1, **options).step

    candidates = {f"fused {name}": steps_of(make) for name, make in FUSED.items()}
    candidates[TORCH] = steps_of(torch.optim.AdamW, fused=True)
    candidates |= {f"eager {name}": steps_of(make, backend="eager") for name, make in FUSED.items()}

    def synchronize() -> None:
        if torch.device(config.device).type == "cuda":
            torch.cuda.synchronize(config.device)

    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(3 + repeats):
        for name, step in candidates.items():
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            # The first three allocate and compile.
            if repeat >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def print_times(times: dict[str, float], config: Config) -> None:
    """Print the step times with all that they depend on."""
    parameters = sum(p.numel() for p in GPT(config).parameters())
    print(f"\nTime of optimizer.step(), {parameters:,} float32 parameters, median of interleaved steps")
    print(f"device   {device_name(config.device)}")
    print(f"backend  {backend_name(config.device)}")
    print(f"torch    {torch.__version__}\n")
    print(f"{'optimizer':26}{'ms':>8}{'x AdamW':>10}")
    for name, milliseconds in times.items():
        print(f"{name:26}{milliseconds:8.3f}{milliseconds / times[TORCH]:10.2f}")


def draw(histories: dict[str, History], times: dict[str, float], config: Config, path: Path) -> None:
    """Draw losses on the left and step times on the right.

    Args:
        histories: losses by optimizer.
        times: milliseconds by optimizer.
        config: what was trained, and where.
        path: the PNG to write.
    """
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    for name, history in histories.items():
        left.plot(*zip(*history.train), color=COLORS[name], alpha=0.4, linewidth=1)
        label = f"{name}, validation ({history.val[-1][1]:.2f} at the end)"
        left.plot(*zip(*history.val), color=COLORS[name], linestyle="none", marker=MARKERS[name], label=label)
    left.plot([], [], color="gray", alpha=0.5, linewidth=1, label="training, single batches")
    left.set(title="Byte-level GPT on Python's standard library", xlabel="step")
    left.set_ylabel("loss (nats per byte)")
    left.legend(frameon=False)
    left.grid(alpha=0.25)

    colors = [COLORS.get(name.removeprefix("fused "), "silver") for name in times]
    bars = right.barh(list(times), list(times.values()), color=colors)
    right.bar_label(bars, fmt="%.2f", padding=4)
    right.invert_yaxis()
    right.margins(x=0.15)
    right.set_title(f"Time of optimizer.step(), backend {backend_name(config.device)}")
    right.set_xlabel("time (milliseconds)")

    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{device_name(config.device)}, torch {torch.__version__}", fontsize=10, color="dimgray")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train, check, time, draw."""
    parser = argparse.ArgumentParser(
        description="Train a small GPT with fused AdaBelief and AdamaxW, then time their steps.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=450, help="training steps of each optimizer")
    parser.add_argument("--device", default=Config.device, help="where to train")
    parser.add_argument("--output", type=Path, default=Path("demo_output/demo.png"), help="picture to write")
    args = parser.parse_args()
    config = Config(layers=2, steps=args.steps, eval_every=50, log_every=5, device=args.device)

    backend = backend_name(config.device)
    print(f"Training on {device_name(config.device)} with backend {backend!r}.")
    if backend == "eager":
        print("No fused backend is ready for this device; `python -m fused_optim` says why.")
    histories = {name: train(replace(config, optimizer=name.lower())) for name in FUSED}

    check_equal(config)
    print(f"\nChecked: after 5 steps, backend {backend!r} and eager give equal parameters, bit for bit.")
    times = time_steps(config)
    print_times(times, config)

    for name, history in histories.items():
        print(f"\nWritten by the model that {name} trained:\n\n{history.sample}")
    draw(histories, times, config, args.output)
    print(f"\nWrote {args.output}.")


if __name__ == "__main__":
    main()
