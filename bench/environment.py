"""Where figures were measured: device, driver, versions, commit and date."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fused_optim

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "torch", "triton", "numpy", "jax", "optax", "adabelief-pytorch", "pytorch_optimizer", "timm", "torch-optimi",
    "flashoptim", "bitsandbytes", "torchao", "deepspeed", "apex", "transformer-engine",
)  # fmt: skip


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else processor()


def memory(device: str) -> int:
    """Bytes that are free."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    info = Path("/proc/meminfo")
    if not info.exists():
        return 8 * 2**30
    fields = dict(line.split(":") for line in info.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _said(*command: str) -> str:
    """What a command prints, or nothing."""
    try:
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "fused_optim": fused_optim.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe(device: str, threads: int) -> dict[str, Any]:
    """All that a figure depends on and that can be told."""
    commit = _said("git", "rev-parse", "--short=12", "HEAD")
    changed = _said("git", "status", "--porcelain", "--untracked-files=no")
    described = {
        "kind": "GPU" if device == "cuda" else "CPU",
        "device_name": device_name(device),
        "processor": processor(),
        "threads": threads,
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "versions": _versions(),
        "commit": commit + ("+changes" if changed else "") if commit else "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }
    if device == "cuda":
        query = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit,memory.total"
        described["driver"] = _said("nvidia-smi", query, "--format=csv,noheader") or "unknown"
        described["cuda"] = torch.version.cuda or torch.version.hip
    return described
