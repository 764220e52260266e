"""Train the demo's GPT with FSDP2 on any number of processes; go on from a checkpoint with another number.

torchrun --nproc-per-node 2 examples/train_fsdp.py --steps 60 --checkpoint fsdp_checkpoint
torchrun --nproc-per-node 1 examples/train_fsdp.py --steps 120 --checkpoint fsdp_checkpoint

On GPUs (nccl) where there are any, else on the CPU (gloo). A checkpoint that is there is resumed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from train_gpt import GPT, Config, decays, evaluate, get_batch, get_loss, load_data, make_schedule

from fused_optim import AdamaxW


def save(model: nn.Module, optimizer: Any, path: Path) -> None:
    """Write the parameters, and the optimizer with its count of steps."""
    weights, states = get_state_dict(model, optimizer)
    writer = dcp.FileSystemWriter(path, overwrite=True)
    dcp.save({"model": weights, "optimizer": states}, storage_writer=writer)


def load(model: nn.Module, optimizer: Any, path: Path) -> int:
    """Read what any number of processes wrote; returns the number of steps that were made."""
    weights, states = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": states}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(optimizer.param_groups[0]["count"])


def main() -> None:
    """Train, save; resume where there is something to resume."""
    parser = argparse.ArgumentParser(description="Train a small GPT with FSDP2.")
    parser.add_argument("--steps", type=int, default=60, help="steps in all, those before a resume included")
    parser.add_argument("--checkpoint", type=Path, help="folder to resume from, and to write at the end")
    parser.add_argument("--state-format", default="bf16", choices=["fp32", "bf16", "8bit"])
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if cuda:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    # The schedule ends at the same step, whatever part of it a run makes.
    config = Config(optimizer="adamaxw", layers=2, width=64, context=64, steps=300)
    config.device = f"cuda:{torch.cuda.current_device()}" if cuda else "cpu"
    train_data, val_data = (data.to(config.device) for data in load_data())

    torch.manual_seed(config.seed)
    model = GPT(config).to(config.device)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    # Made after fully_shard, which replaces the parameters.
    optimizer = AdamaxW(
        model.named_parameters(),
        lr=make_schedule(config),
        weight_decay=config.weight_decay,
        weight_decay_mask=decays,
        state_format=args.state_format,
    )
    first = load(model, optimizer, args.checkpoint) if args.checkpoint and args.checkpoint.exists() else 0
    if rank == 0:
        print(f"{ranks} processes on {config.device}, from step {first}", flush=True)
    for step in range(first, args.steps):
        optimizer.zero_grad()
        # The same batch whatever the number of processes, each of which takes its share.
        inputs, targets = (t[rank::ranks] for t in get_batch(train_data, config, config.seed, step))
        get_loss(model, inputs, targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        if (step + 1) % 20 == 0:
            loss = evaluate(model, val_data, config, batches=4)
            if rank == 0:
                print(f"step {step + 1:4}  validation loss {loss:.4f}", flush=True)
    if args.checkpoint:
        save(model, optimizer, args.checkpoint)
        if rank == 0:
            print(f"wrote {args.checkpoint}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
