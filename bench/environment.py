"""Where figures were measured: device, driver, versions, commit and date."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "fused-optim", "torch", "triton", "numpy", "adabelief-pytorch", "pytorch-optimizer", "timm", "torch-optimi",
    "flashoptim", "bitsandbytes", "torchao", "deepspeed", "apex", "transformer-engine",
)  # fmt: skip


def _field(path: str, name: str) -> str:
    """The value of the first line ``name : value`` of a file in /proc."""
    text = Path(path).read_text() if Path(path).exists() else ""
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def free_memory(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int((_field("/proc/meminfo", "MemAvailable") or "8000000 kB").split()[0]) * 1024


def cache_bytes(device: str) -> int:
    """Of the largest cache, but 64 MiB of a CPU's: virtual machines are told of one that many share."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    paths = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [int(path.read_text().strip().rstrip("K")) * 1024 for path in paths]
    return min(max(sizes, default=32 * 2**20), 2**26)


def _output(*command: str) -> str:
    try:
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""


def describe(device: str) -> dict[str, Any]:
    """What a figure depends on, as far as it can be told."""
    installed = {d.name.lower().replace("_", "-"): d.version for d in metadata.distributions()}
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    commit = _output("git", "rev-parse", "--short=12", "HEAD") or "unknown"
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    processor = _field("/proc/cpuinfo", "model name") or platform.processor()
    described = {
        "kind": "GPU" if device == "cuda" else "CPU",
        "device_name": torch.cuda.get_device_name() if device == "cuda" else processor,
        "processor": processor,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "versions": {"python": platform.python_version(), **versions},
        "commit": commit + ("+changes" if changed else ""),
        "date": time.strftime("%Y-%m-%d"),
    }
    if device == "cuda":
        query = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit"
        described["driver"] = _output("nvidia-smi", query, "--format=csv,noheader") or "unknown"
    return described
