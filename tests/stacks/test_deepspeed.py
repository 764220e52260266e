"""DeepSpeed with one of our optimizers as the client's, over two processes on the CPU."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import RULES, bits
from recipes import run
from recorder import Recorder

pytestmark = [pytest.mark.stacks, pytest.mark.filterwarnings("default")]
RANKS = 2


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def engine_of(stage: int, bf16: bool, rule: str, flatten: bool) -> tuple[Any, Any]:
    import deepspeed

    model = network()
    optimizer = RULES[rule].optimizer(model.parameters(), lr=0.01, flatten=flatten, **RULES[rule].options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)
    return engine, optimizer


def fit(engine: Any, rank: int, steps: int, first: int = 0) -> None:
    dtype = next(engine.parameters()).dtype
    for step in range(first, first + steps):
        for micro in range(2):
            rng = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
            loss = engine(torch.randn(2, 8, generator=rng).to(dtype)).square().mean()
            engine.backward(loss)
            engine.step()


CASES = [
    (stage, bf16, rule, flatten)
    for stage, rule in ((0, "adabelief"), (1, "adamaxw"), (2, "adamw"))
    for bf16 in (False, True)
    for flatten in (False, True)
]


def worker(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    store = torch.distributed.FileStore(str(folder / "store"), RANKS)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False)
    assert get_accelerator().device_name() == "cpu"
    for case in CASES:
        print(case, flush=True)  # of a failure pytest shows what was printed last
        train(rank, folder / str(case), case)
    engine = run("DeepSpeed", model=network())["engine"]
    engine.backward(engine(torch.ones(2, 8, dtype=torch.bfloat16)).sum())
    engine.step()
    (folder / f"done {rank}").touch()
    torch.distributed.destroy_process_group()  # else gloo's threads may be there at the end, which aborts


def train(rank: int, folder: Path, case: tuple[int, bool, str, bool]) -> None:
    """In one go, and on from DeepSpeed's checkpoint in the middle."""
    engine, optimizer = engine_of(*case)
    recorder = Recorder(optimizer)
    fit(engine, rank, 3)
    engine.save_checkpoint(str(folder))
    fit(engine, rank, 3, first=3)
    recorder.check(steps=6)
    again, _ = engine_of(*case)
    again.load_checkpoint(str(folder))
    fit(again, rank, 3, first=3)
    for a, b in zip(again.module.parameters(), engine.module.parameters()):
        assert torch.equal(bits(a), bits(b))
        each = [torch.empty_like(a) for _ in range(RANKS)]
        torch.distributed.all_gather(each, a.detach())
        assert torch.equal(*each)


def test_deepspeed(tmp_path: Path) -> None:
    """Stages 0, 1 and 2, in float32 and bfloat16, with accumulation, clipping and a schedule."""
    torch.multiprocessing.spawn(worker, (tmp_path,), nprocs=RANKS)
    assert len(list(tmp_path.glob("done *"))) == RANKS
