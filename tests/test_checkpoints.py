"""Checkpoints: what is saved, what is loaded, from here and from others, and what is refused."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import (  # isort: skip
    BACKENDS, BF16, KEPT, RULES, Judge, Make, Rule, assert_same_bits, copies, like, parameters,
    raises_unchanged, raises_with, results, saved_and_loaded, set_gradients, snapshot, train, trained,
)  # fmt: skip
from torch import Tensor

from fused_optim import AdaBelief, AdamaxW, AdamW

SHAPES = [(300,), (7, 40), (), (129,)]
OLD = torch.load(Path(__file__).parent / "data" / "version-1.pt", weights_only=True)


def halving(count: int) -> float:
    """A schedule that pickle can find."""
    return 0.1 / 2**count


def check_alike(*optimizers: Any, first: int) -> None:
    """All have the same values, and step on alike. (A block of 8-bit values whose largest is a power of two
    can be stored in two ways.)"""
    want = optimizers[0].state_dict()
    for o in optimizers:
        assert_same_bits(o.state_dict(), want)
        train(o, [p for group in o.param_groups for p in group["params"]], 2, first=first)
        assert_same_bits(results(o), results(optimizers[0]))


def version_1(optimizer: Any) -> dict[str, Any]:
    """What versions up to 0.1 saved: the states as they are, count and seed beside the groups."""
    saved = optimizer.state_dict()
    for number, state in enumerate(optimizer.state.values()):
        saved["state"][number] = {**copies(state)}
    for group in saved["param_groups"]:
        count, seed = group.pop("count"), group.pop("seed")
        del group["version"], group["schedules"]
    return {**saved, "count": count, "seed": seed}


# Saved


def test_a_state_dict_is_a_snapshot(make: Make, rule: Rule, flatten: bool) -> None:
    """Every tensor in it is a copy that owns its bytes alone; each parameter has a step of its own; no
    callable is in it."""
    params = parameters([(), (5,), (4, 5), (0,), (1,)])
    lr = torch.tensor(0.1)
    optimizer = make(
        [{"params": params[:3], "lr": lr}, {"params": params[3:], "lr": halving}], flatten=flatten
    )
    train(optimizer, params, 2)
    saved = optimizer.state_dict()
    kept = copies(saved)
    train(optimizer, params, 2, first=2)
    lr.fill_(0.7)
    optimizer.param_groups[0]["betas"] = (0.1, 0.2)
    assert_same_bits(copies(saved), kept)
    optimizer.load_state_dict(saved)
    saved["param_groups"][0]["lr"].fill_(0.6)
    saved["param_groups"][0]["params"].append(5)
    group = optimizer.param_groups[0]
    assert (float(group["lr"]), len(group["params"])) == (float(torch.tensor(0.1)), 3)
    tensors = [t for state in saved["state"].values() for t in state.values()]
    for t in tensors:
        assert t.untyped_storage().nbytes() == t.numel() * t.element_size()
    filled = [t for t in tensors if t.numel()]
    assert len({t.data_ptr() for t in filled}) == len(filled)
    assert all(set(state) == {"step", "exp_avg", rule.nu} for state in saved["state"].values())
    assert [int(state["step"]) for state in saved["state"].values()] == [2] * 5
    assert [group["count"] for group in saved_and_loaded(saved)["param_groups"]] == [2, 2]


def test_state_dict_hooks(make: Make, rule: Rule) -> None:
    params, optimizer = trained(make, 2)
    twins = parameters()
    loaded = make(twins)
    calls: list[str] = []

    def scale_moments(opt: Any, saved: dict[str, Any]) -> dict[str, Any]:
        calls.append(saved["more"])
        return {**saved, "state": {i: {**s, "exp_avg": s["exp_avg"] * 2} for i, s in saved["state"].items()}}

    def see_state(opt: Any) -> None:
        calls.append("post load")
        assert_same_bits(opt.state[twins[2]]["exp_avg"], optimizer.state[params[2]]["exp_avg"] * 2)

    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("pre save"))
    optimizer.register_state_dict_post_hook(lambda opt, saved: {**saved, "more": "post save, pre load"})
    loaded.register_load_state_dict_pre_hook(scale_moments)
    loaded.register_load_state_dict_post_hook(see_state)
    loaded.load_state_dict(optimizer.state_dict())
    assert calls == ["pre save", "post save, pre load", "post load"]


# Resumed


@pytest.mark.parametrize("format", KEPT)
def test_resuming_gives_the_same_bits(make: Make, format: str, flatten: bool) -> None:
    """From a file, in the other layout for some, pickled and copied; where one parameter is a step behind,
    and a callable gives lr. The seed is saved where it counts. What is loaded aliases nothing."""
    dtype, options = KEPT[format]
    options = {"weight_decay": 0.1, "lr": halving, **options}
    params, optimizer = trained(make, 2, parameters(SHAPES, dtype), flatten=flatten, **options)
    optimizer.seed = 7
    set_gradients(params, 2, skip=[1])
    optimizer.step()
    saved = saved_and_loaded(optimizer.state_dict())
    assert [saved["param_groups"][0][key] for key in ("seed", "count", "version")] == [7, 3, 2]
    into = flatten != (len(format) % 2 == 0)
    twins, resumed = trained(
        make, 1, parameters(SHAPES, dtype), flatten=into, **{**options, "betas": (0.5, 0.6)}
    )
    for p, twin in zip(params, twins):
        twin.data.copy_(p.data)
    kept = copies(saved)
    resumed.load_state_dict(saved)
    assert_same_bits(saved, kept, "the source")
    for t in (t for state in saved["state"].values() for t in state.values()):
        t.fill_(17)
    pickled, copied = pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)
    check_alike(optimizer, resumed, pickled, copied, first=3)


def through_safetensors(saved: dict[str, Any], path: Path) -> dict[str, Any]:
    """Tensors under the parameter's number and their key, everything else as JSON beside them."""
    safetensors = pytest.importorskip("safetensors")
    tensors = {f"{i}.{key}": t for i, state in saved["state"].items() for key, t in state.items()}
    others = {key: value for key, value in saved.items() if key != "state"}
    pytest.importorskip("safetensors.torch").save_file(tensors, path, {"others": json.dumps(others)})
    state: dict[int, dict[str, Tensor]] = {}
    with safetensors.safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            i, key = name.split(".")
            state.setdefault(int(i), {})[key] = file.get_tensor(name)
        return {**json.loads(file.metadata()["others"]), "state": state}


@pytest.mark.parametrize("format", [name for name in KEPT if name != "complex128"])  # safetensors has none
def test_another_backend_and_layout_go_on(format: str, tmp_path: Path) -> None:
    dtype, options = KEPT[format]
    flatten = list(KEPT).index(format) % 2 == 0
    source, into = BACKENDS[::-1] if flatten else BACKENDS
    params, optimizer = trained(
        AdamW, 3, parameters([(140,), (3, 2)], dtype), flatten=not flatten, backend=source, **options
    )
    optimizer.seed = 7
    twins = like(params)
    loaded = AdamW(twins, flatten=flatten, backend=into, **options)
    loaded.load_state_dict(through_safetensors(optimizer.state_dict(), tmp_path / "state.safetensors"))
    for o, ps in ((optimizer, params), (loaded, twins)):
        train(o, ps, 100, first=3)
    assert_same_bits(snapshot(loaded), snapshot(optimizer))


LOCAL: dict[str, tuple[str, Any]] = {
    "lr": ("lr is", lambda count: 0.1 / 2**count),
    "weight_decay": ("weight_decay of group 1 is", lambda count: 0.1),
    "weight_decay_mask": ("weight_decay_mask is", lambda name, p: p.dim() > 1),
}


@pytest.mark.parametrize("key", LOCAL)
def test_callables_that_pickle_cannot_find(make: Make, key: str) -> None:
    """Are named, with what to do; a copy has them, and a state dict leaves them out."""
    text, given = LOCAL[key]
    params = parameters()
    groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:]}]
    if key != "weight_decay_mask":
        groups[key != "lr"][key] = given
    optimizer = make(groups, weight_decay_mask=given if key == "weight_decay_mask" else None)
    train(optimizer, params, 2)
    for _ in range(2):
        with raises_with(pickle.PicklingError, text, "<lambda>", "name in a module", "LambdaLR"):
            pickle.dumps(optimizer)
        check_alike(optimizer, copy.deepcopy(optimizer), first=2)
    saved_and_loaded(optimizer.state_dict())


@pytest.mark.parametrize("key", ["reference_lr", "initial_lr"])
def test_decoupled_lr_refers_to_the_saved_lr(make: Make, rule: Rule, key: str) -> None:
    """Also after a resume at another one, and in older checkpoints, which have ``initial_lr``."""
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "decoupled_lr": True}
    params, optimizer = trained(make, 2, **options)
    optimizer.param_groups[0]["lr"] = 0.05
    assert optimizer.param_groups[0]["reference_lr"] == 0.1
    saved = saved_and_loaded(optimizer.state_dict())
    group = saved["param_groups"][0]
    group[key] = group.pop("reference_lr")
    resumed = make(like(params), **{**options, "lr": 0.7})
    resumed.load_state_dict(saved)
    set_gradients(resumed.param_groups[0]["params"], 2)
    want = Judge(rule, reference_lr=0.1).expected(resumed)
    resumed.step()
    assert_same_bits(snapshot(resumed), want)


@pytest.mark.parametrize("format", OLD)
def test_checkpoints_of_version_1_continue(backend: str, format: str) -> None:
    """A file that version 0.1 wrote, with the parameters that it had then and two steps later."""
    old = OLD[format]
    params = [torch.nn.Parameter(p) for p in copies(old["params"])]
    optimizer = RULES[old["rule"]].optimizer(params, lr=halving, backend=backend, **old["options"])
    optimizer.load_state_dict(old["state_dict"])
    train(optimizer, params, 2, first=3)
    assert_same_bits([p.detach() for p in params], old["next"])


def test_names_in_another_order_are_warned_of(make: Make) -> None:
    """States are loaded by the order of parameters."""
    params = parameters()
    named = list(zip("abc", params))
    saved = make(named).state_dict()
    make(named).load_state_dict(saved)
    make(params).load_state_dict(saved)
    for names, said in (("acb", "another order"), ("abd", "other names")):
        with pytest.warns(UserWarning, match=f"saved group 0 .*{said}.*'c' for '{names[2]}'"):
            make(list(zip(names, params))).load_state_dict(saved)


# Loaded


WIDTH = ["8bit", "bf16", "fp32"]


@pytest.mark.parametrize("source", [*WIDTH, "older 8bit"])
@pytest.mark.parametrize("target", WIDTH)
def test_moments_of_another_format_load(make: Make, rule: Rule, source: str, target: str) -> None:
    """Widening is exact; narrowing is within half a unit of the narrower format. Another dtype and memory
    order are no matter. Older checkpoints call block exponents ``..._base``, where the key now says the
    format."""
    older, source = source.startswith("older"), source.removeprefix("older ")
    params, optimizer = trained(make, 5, parameters(SHAPES), state_format=source)
    saved = saved_and_loaded(version_1(optimizer) if older else optimizer.state_dict())
    for state in saved["state"].values() if older else ():
        for key, suffix in (("exp_avg", "_e4m3"), (rule.nu, "_e5m3")):
            state[key + "_base"] = state.pop(key + suffix)
    if source == "fp32":
        value = saved["state"][1]["exp_avg"]
        saved["state"][1]["exp_avg"] = torch.empty(40, 7, dtype=torch.float64).mT.copy_(value)
    flatten = (WIDTH.index(source) + WIDTH.index(target)) % 2 == 1
    loaded = make(like(params), state_format=target, flatten=flatten)
    loaded.load_state_dict(saved)
    q = loaded.param_groups[0]["params"]
    # Half of a unit in the last place, of 8 or 3 bits of mantissa.
    unit = {"fp32": 0.0, "bf16": 2.0**-8, "8bit": 2.0**-4}[target]
    for p, twin in zip(params, q):
        for key in ("exp_avg", rule.nu):
            want, got = (o.decoded_state(x)[key] for o, x in ((optimizer, p), (loaded, twin)))
            smallest = float(want.abs().max()) * 2.0**-17 if target == "8bit" else 0.0
            if WIDTH.index(source) <= WIDTH.index(target):
                assert torch.equal(got, want)
            assert bool(((got - want).abs() <= unit * want.abs() + smallest).all())
    if source == target:
        check_alike(optimizer, loaded, first=5)
    train(loaded, q, 1)


@pytest.mark.parametrize("source", [None, "master", "split16", "split8"])
@pytest.mark.parametrize("target", [None, "split16", "split8", "of float16"])
def test_masters_of_another_format_load(make: Make, source: str | None, target: str | None) -> None:
    """With the parameters that were saved with it, a master keeps all that the new format holds. ``master``
    is what older checkpoints have: a float32 copy. A plain parameter, or a float16 one, has none."""
    kind = "split16" if source == "master" else source
    params, optimizer = trained(make, 5, parameters(SHAPES, BF16), master_weights=kind)
    saved = saved_and_loaded(optimizer.state_dict())
    if source == "master":
        for p, state in zip(params, saved["state"].values()):
            del state["remainder"]
            state["master"] = optimizer.decoded_state(p)["master"]
    again = like(params)
    if target == "of float16":
        again, target = [torch.nn.Parameter(p.detach().half()) for p in params], None
    loaded = make(again, master_weights=target)
    loaded.load_state_dict(saved)
    for p, q in zip(params, again):
        assert_same_bits(q.detach(), p.detach().to(q.dtype), "parameter")
        assert not any(t.requires_grad for t in loaded.state[q].values())
        if target is None:
            assert set(loaded.state[q]) == set(optimizer.state[p]) - {"remainder"}
            continue
        want = optimizer.decoded_state(p)["master"] if source else p.detach().float()
        error = (loaded.decoded_state(q)["master"] - want).abs()
        narrower = target == "split8" and source in ("master", "split16")
        assert bool((error <= want.abs() * (2.0**-15 if narrower else 0.0)).all())
    train(loaded, again, 1)
    copy.deepcopy(loaded)


# Others' checkpoints


TORCHS: list[tuple[Any, Any, dict[str, Any]]] = [
    (AdamaxW, torch.optim.Adamax, {"weight_decay": 0}),
    (AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
]


@pytest.mark.parametrize(("ours", "torchs", "options"), TORCHS)
def test_checkpoints_of_torch_continue(ours: Any, torchs: Any, options: dict[str, Any]) -> None:
    options = {"lr": 0.01, "betas": (0.8, 0.95), **options}
    params, source = trained(torchs, **options)
    twins = like(params)
    optimizer = ours(twins, backend="cpu")
    optimizer.load_state_dict(saved_and_loaded(source.state_dict()))
    assert {k: optimizer.param_groups[0][k] for k in options} == options
    assert optimizer.param_groups[0]["count"] == 3
    assert_same_bits(snapshot(optimizer)["states"][2]["step"], torch.tensor(3))
    train(source, params, 5, first=3)
    train(optimizer, twins, 5, first=3)
    for p, twin in zip(params, twins):
        torch.testing.assert_close(twin, p, rtol=1e-5, atol=1e-6)


STEPS = [3, 3.0, torch.tensor(3.0), torch.tensor([3.0]), torch.tensor(3, dtype=torch.int32)]


@pytest.mark.parametrize(("step_in", "step"), [("group", 3), *(("state", step) for step in STEPS)])
def test_checkpoints_of_adabelief_ports_continue(backend: str, step_in: str, step: Any) -> None:
    params, optimizer = trained(AdaBelief, lr=0.01, backend=backend)
    state = [{k: v.clone() for k, v in optimizer.state[p].items() if k != "step"} for p in params]
    group: dict[str, Any] = {
        "lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-16, "weight_decay": 0, "amsgrad": False,
        "buffer": [[None, None, None] for _ in range(10)], "params": [0, 1, 2],
    }  # fmt: skip
    for holder in [group] if step_in == "group" else state:
        holder["step"] = step
    twins = like(params)
    loaded = AdaBelief(twins, backend=backend)
    loaded.load_state_dict({"state": dict(enumerate(state)), "param_groups": [group]})
    for o, p in ((optimizer, params), (loaded, twins)):
        train(o, p, 2, first=3)
    assert_same_bits(snapshot(loaded), snapshot(optimizer))
    again = AdaBelief(like(twins), backend=backend)
    again.load_state_dict(loaded.state_dict())
    assert_same_bits(snapshot(again), snapshot(loaded))


DIFFERENT: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "rectify": ({"rectify": True}, ("rectify", "differ")),
    "amsgrad": ({"amsgrad": True}, ("amsgrad", "differ")),
    "L2": ({"weight_decay": 0.1, "decoupled_weight_decay": False}, ("weight_decay", "L2")),
    "L2 unsaid": ({"weight_decay": 0.1}, ("weight_decay", "L2")),
    "another's": ({"cautious": True, "trust": 0.5}, ("cautious", "trust", "differ")),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_another_optimizer_did_otherwise_is_warned_of(make: Make, what: str) -> None:
    """And named; what changes nothing is not."""
    group, texts = DIFFERENT[what]
    params, optimizer = trained(make)
    saved = optimizer.state_dict()
    ours = saved["param_groups"][0]
    common = {k: ours[k] for k in ("lr", "betas", "eps", "params")}
    quiet = {"weight_decay": 0.0, "amsgrad": False, "foreach": None, "fused": True, "rectify": False}
    make(like(params)).load_state_dict({**saved, "param_groups": [{**common, **quiet}]})
    with pytest.warns(UserWarning) as caught:
        make(like(params)).load_state_dict({**saved, "param_groups": [{**common, **quiet, **group}]})
    said = " ".join(str(w.message) for w in caught)
    assert all(text in said for text in (*texts, "group 0")), said
    assert "foreach" not in said


# Refused


NAME = "parameter 2 of group 0"
BAD: list[tuple[str, tuple[str, ...]]] = [
    ("state['exp_avg'] = torch.zeros(5, 4)", ("'exp_avg'", "(5, 4)")),
    ("state[nu] = torch.zeros(1)", ("(1,)",)),
    ("del state['exp_avg']", ("'exp_avg'",)),
    ("del state[nu]", ("no tensor",)),
    ("state['another'] = state.pop(nu)", ("no tensor", "another")),
    ("state.clear(); state['momentum_buffer'] = torch.zeros(4, 5)", ("no ",)),
    ("del state['step']", ("'step'",)),
    ("state[nu] = 1.0", (NAME,)),
    ("state[nu] = torch.zeros(4, 5, dtype=torch.complex64)", ("complex64",)),
    ("state['exp_avg'] = torch.zeros(4, 5, dtype=torch.int32)", ("int32",)),
    ("state['exp_avg'] = torch.zeros(4, 5, dtype=torch.uint8)", ("'exp_avg", "uint8")),
    ("state['master'] = torch.zeros(4, 5, dtype=torch.int32)", ("'master'",)),
    ("state['master'] = 1.0", ("'master'", "float")),
    ("state['remainder'] = torch.zeros(4, 5)", ("'remainder'", "int16")),
    ("state['remainder'] = torch.zeros(5, dtype=torch.int8)", ("'remainder'", "(5,)")),
    *((f"state['step'] = {value}", ("'step'", str(value))) for value in (-1, 2.5, 2**31)),
    *((f"saved['count'] = {value!r}", ("count", repr(value))) for value in (-5, 2.9, "7", 2**31, None)),
    ("saved['param_groups'].append(group)", ("parameter groups",)),
    ("group['params'].pop()", ("size",)),
    ("group['lr'] = -1.0", ("Invalid learning rate: -1.0",)),
    ("group['betas'] = (0.9, 1.0)", ("betas[1]", "must be")),
    ("group['weight_decay_mask'] = [True]", ("weight_decay_mask", "1")),
]


def spoil(statement: str, **names: Any) -> None:
    exec(statement, {"torch": torch, **names})  # noqa: S102 (our own tables)


@pytest.mark.parametrize(("statement", "texts"), BAD)
def test_bad_checkpoints_are_refused(make: Make, rule: Rule, statement: str, texts: tuple[str, ...]) -> None:
    """The optimizer keeps its old state, and steps on."""
    params, optimizer = trained(make)
    saved = trained(make, 1, lr=0.5)[1].state_dict()
    spoil(statement, saved=saved, state=saved["state"][2], group=saved["param_groups"][0], nu=rule.nu)
    before = results(optimizer)
    with raises_unchanged(optimizer, ValueError, *texts, *([NAME] if "state" in statement else [])):
        optimizer.load_state_dict(saved)
    assert_same_bits(results(optimizer), before)
    train(optimizer, params, 1, first=3)
    assert_same_bits(results(optimizer), results(trained(make, 4)[1]))


BROKEN: list[tuple[str, tuple[str, ...]]] = [
    ("del s['exp_avg_e4m3']", ("exp_avg", "uint8")),
    ("s['exp_avg_e4m3'] = s['exp_avg_e4m3'][:1]", ("exp_avg", "(3,)")),
    ("s['exp_avg_e4m3'] = torch.zeros(3)", ("exp_avg", "uint8")),
    ("s['exp_avg_e4m3'].fill_(241)", ("exp_avg_e4m3", "at most 240", "241")),
    ("s['exp_avg_var_e5m3'].fill_(225)", ("exp_avg_var_e5m3", "at most 224", "225")),
]


@pytest.mark.parametrize(("statement", "texts"), BROKEN)
def test_broken_block_exponents_are_refused(backend: str, statement: str, texts: tuple[str, ...]) -> None:
    """In a checkpoint, and by a step where somebody wrote them into the state."""
    params = parameters([(300,)], BF16)
    options = {"master_weights": "split8", "state_format": "8bit", "backend": backend}
    _, optimizer = trained(AdaBelief, 2, params, **options)
    saved = version_1(optimizer)
    spoil(statement, s=saved["state"][0])
    with raises_unchanged(optimizer, ValueError, "parameter 0 of group 0", *texts):
        optimizer.load_state_dict(saved)
    if "fill_" not in statement:
        spoil(statement, s=optimizer.state[params[0]])
        with raises_unchanged(optimizer, RuntimeError, "parameter 0 of group 0", *texts):
            optimizer.step()


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "7", True])
def test_a_seed_is_checked(seed: Any) -> None:
    optimizer = AdaBelief(parameters(SHAPES, BF16), stochastic_rounding=True)
    optimizer.seed = 7
    with raises_with((TypeError, ValueError), "seed", repr(seed)):
        optimizer.load_state_dict({**optimizer.state_dict(), "seed": seed})
    with raises_with((TypeError, ValueError), "seed", repr(seed)):
        optimizer.seed = seed
    assert optimizer.seed == 7
    optimizer.param_groups = []
    assert optimizer.seed == 0
