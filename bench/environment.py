"""Where figures were measured: device, driver, versions, commit and date."""

import os
import platform
import re
import subprocess
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "fused-optim", "torch", "triton", "numpy", "adabelief-pytorch", "pytorch-optimizer", "torch-optimi",
    "flashoptim", "bitsandbytes", "torchao", "deepspeed", "apex", "transformer-engine",
)  # fmt: skip


def free_memory(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _output(*command: str) -> str:
    try:
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""


@cache
def describe(device: str) -> dict[str, Any]:
    """What a figure depends on, as far as it can be told."""
    installed = {d.name.lower().replace("_", "-"): d.version for d in metadata.distributions()}
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    commit = _output("git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes")
    names = re.findall(r"model name\s*: (.*)", _output("cat", "/proc/cpuinfo")) or [platform.processor()]
    described = {
        "kind": "GPU" if device == "cuda" else "CPU",
        "device_name": torch.cuda.get_device_name() if device == "cuda" else names[0],
        "processor": names[0],
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "versions": {"python": platform.python_version(), **versions},
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }
    if device == "cuda":
        query = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit"
        described["driver"] = _output("nvidia-smi", query, "--format=csv,noheader") or "unknown"
    return described
