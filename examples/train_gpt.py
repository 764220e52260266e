"""Train a small byte-level GPT on the sources of Python's standard library.

python examples/train_gpt.py --optimizer adabelief
python examples/train_gpt.py --optimizer adamaxw --checkpoint gpt.pt
python examples/train_gpt.py --optimizer adamaxw --checkpoint gpt.pt --resume
"""

from __future__ import annotations

import argparse
import math
import os
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fused_optim import AdaBelief, AdamaxW

FUSED: dict[str, type[AdaBelief | AdamaxW]] = {"adabelief": AdaBelief, "adamaxw": AdamaxW}
LEARNING_RATES = {"adabelief": 2e-3, "adamaxw": 6e-3, "adamw": 2e-3}


@dataclass
class Config:
    """All that a run depends on; the command line has the same names."""

    optimizer: str = "adabelief"
    backend: str | None = None
    flatten: bool = False
    lr: float | None = None
    warmup: int = 20
    schedule: str = "cosine"
    weight_decay: float = 0.1
    clip: float = 1.0
    steps: int = 500
    batch_size: int = 16
    context: int = 128
    layers: int = 4
    heads: int = 4
    width: int = 128
    eval_every: int = 50
    log_every: int = 10
    checkpoint: Path | None = None
    resume: bool = False
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class History:
    """Losses in nats per byte as (steps made, loss), and text that the model wrote."""

    train: list[tuple[int, float]] = field(default_factory=list)
    val: list[tuple[int, float]] = field(default_factory=list)
    sample: str = ""


class Block(nn.Module):
    """Causal self-attention, then a perceptron, each on a residual branch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attention.transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norm2(x))
        return x


class GPT(nn.Module):
    """A pre-norm transformer that predicts the next byte."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.Sequential(*[Block(config.width, config.heads) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, 256, bias=False)
        self.head.weight = self.embedding.weight
        self.apply(self._initialize)

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens) + self.position(places)
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def load_data() -> tuple[Tensor, Tensor]:
    """The bytes to train on, and the last tenth, held out for validation."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    # Tests and installed packages are in folders, so this leaves them out.
    text = b"".join(path.read_bytes() for path in sorted(stdlib.glob("*.py")))
    if not text:
        raise FileNotFoundError(f"{stdlib} has no .py files to train on")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    split = len(data) * 9 // 10
    return data[:split], data[split:]


def get_batch(data: Tensor, config: Config, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """The inputs and targets of a step, the same whenever it is asked for."""
    generator = torch.Generator().manual_seed(seed * 1_000_000 + step)
    starts = torch.randint(len(data) - config.context, (config.batch_size, 1), generator=generator)
    places = starts + torch.arange(config.context + 1)
    tokens = data[places.to(data.device, non_blocking=True)].long()
    return tokens[:, :-1], tokens[:, 1:]


def get_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, data: Tensor, config: Config, batches: int = 10) -> float:
    """The loss on held-out batches, the same ones every time."""
    losses = [get_loss(model, *get_batch(data, config, seed=0, step=i)) for i in range(batches)]
    return torch.stack(losses).mean().item()


@torch.no_grad()
def generate(model: nn.Module, config: Config, prompt: str = "def ", length: int = 300) -> str:
    """Text that the model writes after ``prompt``, one byte at a time."""
    generator = torch.Generator().manual_seed(config.seed)
    tokens = torch.tensor([list(prompt.encode())], device=config.device)
    for _ in range(length):
        logits = model(tokens[:, -config.context :])[:, -1]
        probabilities = F.softmax(logits / 0.8, dim=-1).cpu()
        next_token = torch.multinomial(probabilities, 1, generator=generator)
        tokens = torch.cat([tokens, next_token.to(tokens.device)], dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace")


def make_schedule(config: Config) -> Callable[[int], float]:
    """The learning rate as a function of the number of steps already made."""
    peak = LEARNING_RATES[config.optimizer] if config.lr is None else config.lr

    def schedule(count: int) -> float:
        if count < config.warmup:
            return peak * (count + 1) / config.warmup
        if config.schedule == "constant":
            return peak
        progress = (count - config.warmup) / max(1, config.steps - config.warmup)
        return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))

    return schedule


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, not to norms and biases."""
    return parameter.dim() >= 2


def make_optimizer(model: nn.Module, config: Config) -> tuple[torch.optim.Optimizer, LambdaLR | None]:
    """The optimizer, and the scheduler that ``torch.optim.AdamW`` needs beside it."""
    schedule = make_schedule(config)
    if config.optimizer in FUSED:
        fused = FUSED[config.optimizer](
            model.named_parameters(),
            lr=schedule,
            weight_decay=config.weight_decay,
            weight_decay_mask=decays,
            flatten=config.flatten,
            backend=config.backend,
        )
        return fused, None
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    # LambdaLR multiplies: from 1 it arrives at the schedule's own values.
    adamw = torch.optim.AdamW(groups, lr=1.0, fused=True)
    return adamw, LambdaLR(adamw, schedule)


def save_checkpoint(path: Path, parts: dict[str, Any], step: int, history: History) -> None:
    """Write the state of a run after ``step`` steps.

    Args:
        path: the file, replaced if it exists.
        parts: everything that has a state dict, by name.
        step: number of steps made.
        history: losses so far.
    """
    states = {name: part.state_dict() for name, part in parts.items()}
    # A run that is killed while it writes keeps its last checkpoint.
    unfinished = path.with_name(path.name + ".tmp")
    torch.save({"step": step, "history": asdict(history), **states}, unfinished)
    os.replace(unfinished, path)


def load_checkpoint(path: Path, parts: dict[str, Any], device: str) -> tuple[int, History]:
    """Load what :func:`save_checkpoint` wrote into ``parts``; the steps made and the losses."""
    saved = torch.load(path, map_location=device, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["step"], History(**saved["history"])


def train(config: Config) -> History:
    """Train a model, with its losses on a progress bar."""
    # Here, for the benchmark takes the model alone, where tqdm may be missing.
    from tqdm import tqdm

    torch.manual_seed(config.seed)
    train_data, val_data = (data.to(config.device) for data in load_data())
    model = GPT(config).to(config.device)
    optimizer, scheduler = make_optimizer(model, config)

    parts: dict[str, Any] = {"model": model, "optimizer": optimizer}
    if scheduler is not None:
        parts["scheduler"] = scheduler
    if config.resume:
        if config.checkpoint is None:
            raise ValueError("resume needs a checkpoint to resume from")
        start, history = load_checkpoint(config.checkpoint, parts, config.device)
    else:
        start, history = 0, History()

    def validate(step: int) -> None:
        loss = evaluate(model, val_data, config)
        history.val.append((step, loss))
        tqdm.write(f"{config.optimizer}  step {step:5}  validation loss {loss:.3f}")

    if start == 0:
        validate(0)
    steps = range(start, config.steps)
    bar = tqdm(steps, initial=start, total=config.steps, desc=config.optimizer, disable=None)
    for step in bar:
        loss = get_loss(model, *get_batch(train_data, config, config.seed, step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()

        # Reading a loss waits for the GPU, hence not at every step.
        if step % config.log_every == 0:
            history.train.append((step, loss.item()))
            bar.set_postfix(loss=f"{history.train[-1][1]:.3f}")
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            validate(step + 1)
            if config.checkpoint is not None:
                save_checkpoint(config.checkpoint, parts, step + 1, history)

    history.sample = generate(model, config)
    return history


def parse_args() -> Config:
    """The command line as a :class:`Config`."""
    parser = argparse.ArgumentParser(
        description="Train a small byte-level GPT on the sources of Python's standard library.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--optimizer", choices=LEARNING_RATES, default=Config.optimizer, help="adamw is torch.optim.AdamW")
    add("--backend", default=Config.backend, help="of fused_optim; None takes the best that the device has")
    add("--flatten", action="store_true", help="keep parameters, gradients and states in one buffer each")
    add("--lr", type=float, default=Config.lr, help="peak learning rate; None takes the optimizer's own")
    add("--warmup", type=int, default=Config.warmup, help="steps over which the learning rate rises")
    add("--schedule", choices=("cosine", "constant"), default=Config.schedule, help="after the warm-up")
    add("--weight-decay", type=float, default=Config.weight_decay, help="of matrices")
    add("--clip", type=float, default=Config.clip, help="largest norm of all gradients together")
    add("--steps", type=int, default=Config.steps, help="training steps, earlier runs' included")
    add("--batch-size", type=int, default=Config.batch_size, help="sequences in a batch")
    add("--context", type=int, default=Config.context, help="bytes in a sequence")
    add("--layers", type=int, default=Config.layers, help="transformer blocks")
    add("--heads", type=int, default=Config.heads, help="attention heads in a block")
    add("--width", type=int, default=Config.width, help="features of a byte")
    add("--eval-every", type=int, default=Config.eval_every, help="steps between validations")
    add("--log-every", type=int, default=Config.log_every, help="steps between training losses")
    add("--checkpoint", type=Path, default=Config.checkpoint, help="file to save to at each validation")
    add("--resume", action="store_true", help="continue from --checkpoint, with the same other options")
    add("--seed", type=int, default=Config.seed, help="of the weights and the order of the data")
    add("--device", default=Config.device, help="where to train")
    args = parser.parse_args()
    if args.resume and args.checkpoint is None:
        parser.error("--resume needs --checkpoint")
    return Config(**vars(args))


def main() -> None:
    """Train as the command line says and print what the model writes."""
    print(train(parse_args()).sample)


if __name__ == "__main__":
    main()
