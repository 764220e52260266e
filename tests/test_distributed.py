"""Sharded and replicated training, run for real: processes over gloo, DTensors, FSDP, DDP, ZeRO, checkpoints
that are read by another number of processes. One start of the processes makes all the checks of a number of
ranks, since a start takes seconds; each check is a test."""

import itertools
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp

from helpers import (  # isort: skip
    BF16, F32, RULES, assert_same_bits, built_once, gradient, parameters, raises_with,
)  # fmt: skip
from recipes import run
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)  # fmt: skip
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import MixedPrecisionPolicy, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel

from fused_optim.layout import local

FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (F32, {}),
    "bf16": (F32, {"state_format": "bf16"}),
    "split16+bf16": (BF16, {"master_weights": "split16", "state_format": "bf16"}),
    "split8": (BF16, {"master_weights": "split8"}),
    "stochastic": (BF16, {"stochastic_rounding": True}),
    "8bit": (F32, {"state_format": "8bit"}),
    "split8+8bit": (BF16, {"master_weights": "split8", "state_format": "8bit"}),
}
EXACT = [name for name in FORMATS if "8bit" not in name]
"""Formats whose bits do not depend on how parameters are cut; blocks of 8 bits are a shard's own."""
Check = Callable[[Path], None]
CHECKS: dict[int, dict[str, Check]] = {2: {}, 4: {}}
"""By number of ranks and name; each is given a folder that is shared by all."""


def check(function: Check, ranks: int = 2) -> Check:
    CHECKS[ranks][function.__name__] = function
    return function


def check_of_4(function: Check) -> Check:
    return check(function, 4)


def run_checks(rank: int, ranks: int, folder: Path) -> None:
    # Else that would be the backend which is taken, and take ten times as long.
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)
    init = f"file://{folder}/init{ranks}"
    dist.init_process_group("gloo", init, timedelta(minutes=30), rank=rank, world_size=ranks)
    warnings.simplefilter("error")
    of_fsdp1 = ".*(FSDP|_get_pg_default_device|TypedStorage|ShardedTensor|Multiple backends)"  # torch's own
    warnings.filterwarnings("ignore", of_fsdp1)
    for name, function in CHECKS[ranks].items():
        said = ""
        torch.manual_seed(0)
        try:
            function(folder)
        except BaseException:  # noqa: BLE001 (also what pytest.fail raises)
            said = traceback.format_exc()
        (folder / f"{name}.{rank}").write_text(said)
        dist.barrier()
    dist.destroy_process_group()


def outcomes(factory: pytest.TempPathFactory, ranks: int) -> Path:
    def build(folder: Path) -> None:
        mp.spawn(run_checks, (ranks, folder), nprocs=ranks)

    return built_once(factory, f"distributed{ranks}", build)


@pytest.mark.parametrize("name", CHECKS[2])
def test_on_2_ranks(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    assert_passed(outcomes(tmp_path_factory, 2), name, 2)


@pytest.mark.stacks
@pytest.mark.parametrize("name", CHECKS[4])
def test_on_4_ranks(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    os.environ["FUSED_OPTIM_FOLDER_OF_2"] = str(outcomes(tmp_path_factory, 2))
    assert_passed(outcomes(tmp_path_factory, 4), name, 4)


def assert_passed(folder: Path, name: str, ranks: int) -> None:
    said = [(folder / f"{name}.{rank}").read_text() for rank in range(ranks)]
    assert not any(said), "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(said) if text)


# What the checks share


def options_of(format: str, **more: Any) -> tuple[Any, torch.dtype, dict[str, Any]]:
    """An optimizer's class, the dtype of its parameters and its options; formats take rules in turns."""
    dtype, options = FORMATS[format]
    rule = list(RULES.values())[list(FORMATS).index(format) % len(RULES)]
    return rule.optimizer, dtype, {"lr": 0.01, "weight_decay": 0.1, **rule.options, **options, **more}


def trainer(format: str, of: Callable[[torch.dtype], nn.Module], **more: Any) -> tuple[Any, Any]:
    make, dtype, options = options_of(format, **more)
    model = of(dtype)
    return model, make(model.parameters(), **options)


def small_model(dtype: torch.dtype = F32) -> nn.Sequential:
    """With shards that are uneven, empty on the last rank, or begin in the middle of eight elements."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(9, 37), nn.ReLU(), nn.Linear(37, 5), nn.ReLU(), nn.Linear(5, 1)).to(dtype)


def sharded(dtype: torch.dtype = F32, **options: Any) -> nn.Sequential:
    model = small_model(dtype)
    for layer in model[::2]:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def backward(model: nn.Module, step: int) -> None:
    p = next(model.parameters())
    # Of a mesh of two dimensions the first one has the data.
    torch.manual_seed(step + (p.device_mesh.get_local_rank(0) if isinstance(p, DTensor) else dist.get_rank()))
    model(torch.randn(4, 9, dtype=p.dtype)).square().sum().backward()


def placed_like(p: Tensor, t: Tensor) -> Tensor:
    return distribute_tensor(t, p.device_mesh, p.placements) if isinstance(p, DTensor) else t.clone()


def fill(model: nn.Module, seed: int) -> None:
    """Gradients that depend on nothing but the seed, placed like their parameters."""
    for i, p in enumerate(model.parameters()):
        p.grad = placed_like(p, gradient(torch.empty(p.shape, dtype=p.dtype), 1000 * seed + i))


def step_like(
    single: Any, twin: nn.Module, optimizer: Any, model: nn.Module, what: str,
    after_backward: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Steps with the gradients of backward passes, which must be the single process's."""
    for step in range(4):
        optimizer.zero_grad()
        backward(model, step)
        after_backward()
        for p, q in zip(model.parameters(), twin.parameters()):
            q.grad = whole(p.grad).clone()
        optimizer.step()
        single.step()
        assert_same_bits(values_of(model), values_of(twin), f"{what}, step {step}")


def steps(model: nn.Module, optimizer: Any, count: int, first: int = 0) -> None:
    for seed in range(first, first + count):
        fill(model, seed)
        optimizer.step()
    optimizer.zero_grad()


def whole(t: Any) -> Any:
    return t.full_tensor() if isinstance(t, DTensor) else t


def values_of(model: nn.Module) -> dict[str, Tensor]:
    names = (name.removeprefix("module.") for name, _ in model.named_parameters())
    return {name: whole(p.detach()).clone() for name, p in zip(names, model.parameters())}


def state_of(optimizer: Any) -> list[dict[str, Tensor]]:
    """As saved, of whole parameters."""
    return [{k: whole(v) for k, v in s.items()} for s in optimizer.state_dict()["state"].values()]


# FSDP2 and DTensors


@check
def fsdp2_steps_like_one_process(folder: Path) -> None:
    """In every format that does not have blocks, with clipping, and resharded before each step."""
    for format in EXACT:
        (model, optimizer), (twin, single) = (trainer(format, of) for of in (sharded, small_model))

        def clip_and_reshard(model: Any = model) -> None:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            model.unshard()
            model.reshard()

        step_like(single, twin, optimizer, model, format, clip_and_reshard)
        assert_same_bits(state_of(optimizer), state_of(single), format)
        for p in model.parameters():
            like_p = [v for k, v in optimizer.state[p].items() if k != "step"]
            assert all((v.device_mesh, v.placements) == (p.device_mesh, p.placements) for v in like_p)


@check
def clipping_takes_the_norm_of_all_ranks(folder: Path) -> None:
    """Sharded, replicated and plain parameters: each element counts once, and a step is the single process's
    with the coefficient of that norm. A gradient that is not finite on one rank skips the step on all."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for backend in ("cpu", "eager"):
        wholes = parameters(((13, 7), (5, 3), (4,)))
        params = [
            distribute_tensor(p.detach(), mesh, [place]) for p, place in zip(wholes, (Shard(0), Replicate()))
        ]
        params = [*(nn.Parameter(p) for p in params), nn.Parameter(wholes[2].detach().clone())]
        make = RULES["adamw"].optimizer
        ours = make(params, max_grad_norm=0.5, skip_nonfinite=True, backend=backend)
        single = make(wholes, max_grad_norm=0.5, skip_nonfinite=True, backend="eager")
        for step in range(3):
            for i, (p, q) in enumerate(zip(params, wholes)):
                q.grad = gradient(q, 10 * step + i)
                if step == 2 and i == 0:
                    q.grad[-1] = torch.inf
                p.grad = placed_like(p, q.grad)
            ours.step()
            single.step()
            assert ours.grad_norm is not None and single.grad_norm is not None
            # Two orders of adding positive float64: some 40 roundings of 2^-53 each, halved by the root.
            torch.testing.assert_close(ours.grad_norm, single.grad_norm, rtol=1e-14, atol=0)
            assert_same_bits([whole(p.detach()) for p in params], [q.detach() for q in wholes])
        assert ours.skipped is not None and int(ours.skipped) == 1


@check
def each_backend_steps_shards(folder: Path) -> None:
    """As eager does, 8 bits too, whose blocks are a shard's own; eager's are those of its local values."""
    for format in FORMATS:
        trainers = [trainer(format, sharded, backend=backend) for backend in ("cpu", "eager")]
        for model, optimizer in trainers:
            steps(model, optimizer, 3)
        assert_same_bits(*(values_of(model) for model, _ in trainers), format)
        assert_same_bits(*(state_of(optimizer) for _, optimizer in trainers), format)


@check
def what_is_offloaded_is_let_go(folder: Path) -> None:
    """Between two steps: nothing keeps the memory of before, and the next steps are the same."""
    (model, optimizer), (twin, single) = (trainer("fp32", of) for of in (sharded, small_model))
    steps(model, optimizer, 2)
    steps(twin, single, 2)
    tensors = [t for p in model.parameters() for t in (p, *optimizer.state[p].values())]
    gone = [StorageWeakRef(local(t).untyped_storage()) for t in tensors if local(t).numel()]
    del tensors
    for state in optimizer.state.values():
        state.update({key: t.clone() for key, t in state.items()})
    model.double().float()
    assert all(storage.expired() for storage in gone)
    steps(model, optimizer, 2, first=2)
    steps(twin, single, 2, first=2)
    assert_same_bits(values_of(model), values_of(twin))


@check
def gradients_come_and_go(folder: Path) -> None:
    (model, optimizer), (twin, single) = (trainer("fp32", of) for of in (sharded, small_model))
    for seed in range(6):
        fill(model, seed)
        fill(twin, seed)
        for i, (p, q) in enumerate(zip(model.parameters(), twin.parameters())):
            if (i + seed) % 3 == 0:
                p.grad = q.grad = None
        optimizer.step()
        single.step()
        assert_same_bits(values_of(model), values_of(twin), f"step {seed}")


@check
def mixed_precision(folder: Path) -> None:
    """float32 parameters computed with in bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=F32)
    model, optimizer = trainer("bf16", lambda dtype: sharded(dtype, mp_policy=policy))
    twin, single = trainer("bf16", small_model)
    step_like(single, twin, optimizer, model, "bf16")


WEIGHTS = [(6, 10), (3, 7), (1, 5), (8,)]


def check_placements(
    mesh: Any, placements: list[Any], formats: list[str],
    place_gradient: Callable[[Tensor], Tensor] | None = None, shapes: Any = WEIGHTS,
) -> None:  # fmt: skip
    """A step of DTensors placed so is the single process's."""
    for format in formats:
        make, dtype, options = options_of(format)
        twins = parameters(shapes, dtype)
        params = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, placements)) for p in twins]
        optimizer, single = make(params, **options), make(twins, **options)
        for seed in range(3):
            for i, (p, q) in enumerate(zip(params, twins)):
                q.grad = gradient(q, 1000 * seed + i)
                p.grad = place_gradient(q.grad) if place_gradient else placed_like(p, q.grad)
            optimizer.step()
            single.step()
        for p, q in zip(params, twins):
            assert_same_bits(whole(p.detach()), q.detach(), f"{format} {placements}")


@check
def other_placements(folder: Path) -> None:
    """Tensor parallelism, and gradients that are placed in another way than their parameters."""
    mesh = init_device_mesh("cpu", (2,))
    for placement in (Replicate(), Shard(0)):
        check_placements(mesh, [placement], EXACT)
    check_placements(mesh, [Shard(0)], EXACT, lambda g: distribute_tensor(g, mesh, [Replicate()]))

    def halves(g: Tensor) -> DTensor:  # summed over both ranks, exactly
        return DTensor.from_local(g / 2, mesh, [Partial()])

    check_placements(mesh, [Shard(1)], ["fp32"], halves, WEIGHTS[:3])
    check_placements(mesh, [Replicate()], ["fp32"], halves)


@check
def what_shards_cannot_have_is_refused(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    columns = nn.Parameter(distribute_tensor(torch.ones(6, 10), mesh, [Shard(1)]))
    for format in ("bf16", "8bit"):
        make, _, options = options_of(format)
        with raises_with(ValueError, "'weight'", "Shard(dim=1)", "Shard(0)", "state_format"):
            make([("weight", columns)], **options)
    with raises_with(ValueError, "'weight'", "DTensor", "flatten=False"):
        make([("weight", columns)], flatten=True)
    optimizer = RULES["adamw"].optimizer([("weight", columns)])
    optimizer.init_state()
    columns.grad = torch.zeros_like(columns)
    moment = optimizer.state[columns]["exp_avg"]
    optimizer.state[columns]["exp_avg"] = moment.redistribute(placements=[Replicate()])
    with raises_with(RuntimeError, "'exp_avg'", "'weight'", "placements"):
        optimizer.step()
    optimizer.state[columns]["exp_avg"] = moment
    optimizer.step()
    other = init_device_mesh("cpu", (2,), mesh_dim_names=("other",))
    for before in (columns.grad, None):
        columns.grad = before
        optimizer.step()
        columns.grad = distribute_tensor(torch.zeros(6, 10), other, [Shard(1)])
        with raises_with(RuntimeError, "'weight'", "is on the mesh", "other"):
            optimizer.step()


@check
def states_of_shards_as_values(folder: Path) -> None:
    """Taken out they are placed like their parameter. Put back, or whole into another optimizer, they are the
    same values; and the next steps are the same."""
    for format in ("fp32", "split16+bf16", "split8+8bit"):
        models, (ours, put_back, other) = zip(*(trainer(format, sharded) for _ in range(3)))
        for model, optimizer in zip(models[:2], (ours, put_back)):
            steps(model, optimizer, 2)
        for p, q, r in zip(*(m.parameters() for m in models)):
            state = ours.decoded_state(p)
            assert ("master" in state) == ("split" in format)
            for t in (t for key, t in state.items() if key != "step"):
                placed = (t.shape, t.device_mesh, t.placements)
                assert placed == (p.shape, p.device_mesh, p.placements), format
            put_back.set_decoded_state(q, state)
            with torch.no_grad():
                r.copy_(p)
            other.set_decoded_state(r, {key: whole(t) for key, t in state.items()})
            for copied in (put_back.decoded_state(q), other.decoded_state(r)):
                assert_same_bits(*({k: whole(t) for k, t in s.items()} for s in (copied, state)), format)
            with raises_with(ValueError, "'exp_avg'", "of parameter", "shape"):
                put_back.set_decoded_state(q, {**state, "exp_avg": torch.zeros(99)})
        for model, optimizer in zip(models, (ours, put_back, other)):
            steps(model, optimizer, 2, first=2)
            assert_same_bits(values_of(model), values_of(models[0]), format)
            assert_same_bits(state_of(optimizer), state_of(ours), format)


# Checkpoints


OPTIONS = {
    "sharded": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True),
    "from rank 0": StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True),
}


@check
def state_dicts_of_checkpoint_helpers(folder: Path) -> None:
    """torch.distributed.checkpoint.state_dict, in every format: the next steps are the same, and count and
    seed."""
    for format in FORMATS:
        model, optimizer = trainer(format, sharded)
        optimizer.seed = 7
        steps(model, optimizer, 2)
        kept = []
        ways = list(OPTIONS) if format in ("bf16", "split8+8bit") else ["flattened", "from rank 0"]
        for how in ways:
            given = OPTIONS[how]
            gather = replace(given, broadcast_from_rank0=False)
            saved = get_optimizer_state_dict(model, optimizer, options=gather)
            assert how != "from rank 0" or dist.get_rank() == 0 or saved == {}
            again, other = trainer(format, sharded, lr=0.7, weight_decay=0.3)
            with torch.no_grad():
                for p in again.parameters():
                    p.mul_(0.5)
            set_model_state_dict(again, get_model_state_dict(model))
            set_optimizer_state_dict(again, other, saved, options=given)
            kept.append((how, again, other))
        steps(model, optimizer, 2, first=2)
        for how, again, other in kept:
            assert (other.param_groups[0]["count"], other.seed) == (2, 7), (format, how)
            steps(again, other, 2, first=2)
            assert_same_bits(values_of(again), values_of(model), f"{format} {how}")
            assert_same_bits(state_of(other), state_of(optimizer), f"{format} {how}")


def seeing(count: int) -> float:
    """A schedule, of which each call counts."""
    SEEN.append(count)
    return 0.01 / 2**count


SEEN: list[int] = []


@check
def asking_for_a_state_dict_changes_nothing(folder: Path) -> None:
    """Before the first step torch's helpers make one with lr 0 and gradients 0."""
    some = ["8bit", "split8", "stochastic"]

    def with_negative_zeros(dtype: torch.dtype) -> nn.Module:
        model = sharded(dtype)
        with torch.no_grad():
            for p in model.parameters():
                p.to_local()[:1] = -0.0
        return model

    for lr, formats in ((0.01, some), (torch.tensor(0.01), ["fp32"]), (seeing, ["split16+bf16"])):
        for format in formats:
            trainers = [trainer(format, with_negative_zeros, lr=lr) for _ in range(3)]
            (model, optimizer), (_, other), (again, fresh) = trainers
            before = values_of(model)
            SEEN.clear()
            get_optimizer_state_dict(model, optimizer)
            assert_same_bits(values_of(model), before)
            assert SEEN == []
            assert optimizer.param_groups[0]["count"] == 0
            assert all(int(s["step"]) == 0 for s in optimizer.state.values())
            other.init_state()
            assert_same_bits(state_of(optimizer), state_of(other))
            steps(model, optimizer, 2)
            assert SEEN == ([0, 1] if lr is seeing else [])
            steps(again, fresh, 2)
            assert_same_bits(values_of(model), values_of(again), format)


def checkpoint_of(model: nn.Module, optimizer: Any, flatten: bool) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def forms_of(format: str) -> tuple[bool, ...]:
    """Whether checkpoints are flattened: both in turns, and after one another."""
    return (True, False) if format == "bf16" else (list(FORMATS).index(format) % 2 == 0,)


def read_checkpoint(folder: Path, format: str, model: nn.Module, optimizer: Any) -> None:
    for flatten in forms_of(format):
        state = checkpoint_of(model, optimizer, flatten)
        dcp.load(state, checkpoint_id=folder / f"{format}{flatten}")
        set_model_state_dict(model, state["model"])
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def read_and_step(folder: Path, shard: bool) -> None:
    """The next steps after a checkpoint of two ranks are as they would have been."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    for format in FORMATS:
        same_bits = format in EXACT or ranks == 2  # else blocks have other bounds
        model, optimizer = trainer(format, sharded if shard else small_model, lr=seeing)
        read_checkpoint(folder, format, model, optimizer)
        assert (optimizer.param_groups[0]["count"], optimizer.seed) == (2, 7)
        saved = torch.load(folder / f"{format}.pt", weights_only=True)
        assert_same_bits(values_of(model), saved["values"], format)
        if same_bits:
            assert_same_bits(state_of(optimizer), saved["state"], format)
        steps(model, optimizer, 2, first=2)
        for name, value in values_of(model).items():
            want = saved["next values"][name]
            if same_bits:
                assert_same_bits(value, want, f"{format} {name}")
            else:  # within two steps of lr 0.01
                assert float((value - want).abs().max()) < 0.02


@check
def checkpoints_are_written_and_read(folder: Path) -> None:
    """By dcp.save and dcp.load; other numbers of ranks read these too."""
    for format in FORMATS:
        model, optimizer = trainer(format, sharded, lr=seeing)
        optimizer.seed = 7
        steps(model, optimizer, 2)
        for flatten in forms_of(format):
            state = checkpoint_of(model, optimizer, flatten)
            dcp.save(state, checkpoint_id=folder / f"{format}{flatten}")
        want = {"values": values_of(model), "state": state_of(optimizer)}
        steps(model, optimizer, 2, first=2)
        want["next values"] = values_of(model)
        if dist.get_rank() == 0:
            torch.save(want, folder / f"{format}.pt")
    dist.barrier()
    read_and_step(folder, shard=True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_process_reads_what_two_wrote(tmp_path_factory: pytest.TempPathFactory) -> None:
    read_and_step(outcomes(tmp_path_factory, 2), shard=False)


@check_of_4
def four_ranks_read_what_two_wrote(folder: Path) -> None:
    read_and_step(Path(os.environ["FUSED_OPTIM_FOLDER_OF_2"]), shard=True)


@check_of_4
def meshes_of_two_dimensions(folder: Path) -> None:
    """HSDP; FSDP with tensor parallelism."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    check_placements(mesh, [Replicate(), Shard(0)], EXACT)
    check_placements(mesh, [Shard(0), Shard(0)], EXACT)
    model, optimizer = trainer("bf16", lambda dtype: sharded(dtype, mesh=mesh))
    twin, single = trainer("bf16", small_model)
    steps(model, optimizer, 3)
    steps(twin, single, 3)
    assert_same_bits(values_of(model), values_of(twin))


@check_of_4
def fsdp2_with_tensor_parallelism(folder: Path) -> None:
    """Rows that both shard are strided: formats that go by the index are refused, others have the bits of one
    process, with clipping inside the step too."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for format, given in (("fp32", {}), ("fp32", {"max_grad_norm": 0.1}), ("bf16", {})):
        make, _, options = options_of(format, **given)
        models = []
        for _ in range(2):
            torch.manual_seed(1)
            models.append(nn.Sequential(nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, 4)))
        model, twin = models
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["data"])
        assert any("_StridedShard" in repr(p.placements) for p in model.parameters())
        if format == "bf16":
            with raises_with(ValueError, "0.weight", "_StridedShard", "state_format"):
                make(model.named_parameters(), **options)
            continue
        optimizer, single = (make(m.parameters(), **options) for m in models)
        step_like(single, twin, optimizer, model, format)


@pytest.mark.stacks
def test_the_example(tmp_path: Path) -> None:
    """examples/train_fsdp.py on two processes, resumed by one."""
    example = Path(__file__).parent.parent / "examples" / "train_fsdp.py"
    for ranks, first, steps in ((2, 0, 4), (1, 4, 20)):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        given = [str(example), f"--steps={steps}", f"--checkpoint={tmp_path / 'checkpoint'}"]
        run = subprocess.run([*launch, *given], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        assert f"{ranks} processes on" in run.stdout and f"from step {first}\n" in run.stdout
    assert "step   20  validation loss" in run.stdout


@check
def the_recipe(folder: Path) -> None:
    """docs/recipes.md's for FSDP2: states are there, and were read again, before the first step."""
    model = nn.Sequential()
    model.blocks = nn.Sequential(nn.Linear(9, 37), nn.ReLU(), nn.Linear(37, 1))
    optimizer = run("FSDP2", model=model, schedule=seeing, path=folder / "recipe")["optimizer"]
    assert len(optimizer.state) == 4
    steps(model, optimizer, 2)
    assert {int(s["step"]) for s in state_of(optimizer)} == {2}


# DDP, ZeRO, FSDP1

VIEWS_AND_FLAT = [(False, False), (False, True), (True, False), (True, True)]


@check
def ddp(folder: Path) -> None:
    """With gradients that are views of DDP's buckets, and not; list and flat."""
    for views, flatten in VIEWS_AND_FLAT:
        replicated = DistributedDataParallel(small_model(), gradient_as_bucket_view=views)
        model, optimizer = trainer("fp32", lambda _, m=replicated: m, flatten=flatten)
        twin, single = trainer("fp32", small_model)
        step_like(single, twin, optimizer, model, f"views {views}, flatten {flatten}")


@check
def zero_redundancy_optimizer(folder: Path) -> None:
    """Parameters that ZeRO moves into its buckets stay there, flat or not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of its import
        from torch.distributed.optim import ZeroRedundancyOptimizer
    make, _, options = options_of("fp32")
    for views, flatten in VIEWS_AND_FLAT:
        model, twin = DistributedDataParallel(small_model()), small_model()
        given = {"parameters_as_bucket_view": views, "flatten": flatten, **options}
        zero = ZeroRedundancyOptimizer(model.parameters(), make, **given)
        single = make(twin.parameters(), backend="eager", **options)
        step_like(single, twin, zero, model, f"views {views}, flatten {flatten}")


@check
def fsdp1(folder: Path) -> None:
    """Its own state dicts, full or sharded, in every format: the next steps are the same. (With
    use_orig_params=True torch 2.13 loads other first moments than it saved, of torch.optim.AdamW too.)"""
    kinds = (StateDictType.FULL_STATE_DICT, StateDictType.SHARDED_STATE_DICT)
    for format, kind in itertools.product(FORMATS, kinds):
        make, dtype, options = options_of(format)
        models = [FSDP1(small_model(dtype), device_id=torch.device("cpu")) for _ in range(2)]
        for model in models:
            FSDP1.set_state_dict_type(model, kind)
        optimizer, other = (make(m.parameters(), **options) for m in models)
        for step in range(2):
            optimizer.zero_grad()
            backward(models[0], step)
            optimizer.step()
        saved = FSDP1.optim_state_dict(models[0], optimizer)
        with torch.no_grad():
            for p, q in zip(models[0].parameters(), models[1].parameters()):
                q.copy_(p)
        other.load_state_dict(FSDP1.optim_state_dict_to_load(models[1], other, saved))
        for model, o in zip(models, (optimizer, other)):
            o.zero_grad()
            backward(model, 2)
            o.step()
        for p, q in zip(models[0].parameters(), models[1].parameters()):
            assert_same_bits(q.detach(), p.detach(), f"{format} {kind}")
