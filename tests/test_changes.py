"""Somebody changes something between two steps: the bits are those of the reference on fresh tensors.

One table of changes; for each the step after it, in both layouts, on every backend and in several
formats, must give what :class:`helpers.Judge` works out on copies. What cannot be stepped is refused.
"""

import copy
import dataclasses
import pickle
import random
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from helpers import (  # isort: skip
    RULES, Judge, assert_same_bits, gradient, interpreted, raises_unchanged, raises_with, snapshot,
)  # fmt: skip
from torch import Tensor
from torch.utils import swap_tensors
from torch.utils._python_dispatch import TorchDispatchMode

from fused_optim.backends import BACKENDS as ALL_BACKENDS

pytestmark = interpreted

FORMATS: dict[str, tuple[torch.dtype, torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, torch.float64, {}),
    "bf16": (torch.float32, torch.bfloat16, {"state_format": "bf16"}),
    "8bit+split8": (torch.bfloat16, torch.float32, {"state_format": "8bit", "master_weights": "split8"}),
}
"""The dtype of most parameters, of one more, and what the optimizer is asked for."""


class World:
    """Seven parameters in two groups, an optimizer and its judge. c has gaps, and f another dtype."""

    def __init__(self, rule: str, backend: str, flatten: bool, format: str) -> None:
        dtype, other, options = FORMATS[format]
        rng = torch.Generator().manual_seed(1)

        def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=rng).to(dtype)

        self.rule, self.steps = RULES[rule], 0
        self.p: dict[str, Any] = {
            name: torch.nn.Parameter(values)
            for name, values in {
                "a": new(5, 5), "b": new(5, 5), "c": new(5, 10)[:, ::2], "d": new(130), "e": new(),
                "f": new(3, dtype=other), "g": new(0),
            }.items()
        }  # fmt: skip
        self.judge = Judge(self.rule, **options)
        first, second = ([(name, self.p[name]) for name in names] for names in ("abc", "defg"))
        of_second = {"lr": 0.05, "weight_decay": 0.1, "weight_decay_mask": [True, False, True, True]}
        groups = [{"params": first}, {"params": second, **of_second}]
        self.optimizer = self.rule.optimizer(
            groups, lr=0.02, backend=backend, flatten=flatten, **self.rule.options, **options
        )
        self.kept: list[Any] = []

    def group(self, of: Any) -> tuple[dict[str, Any], int]:
        places = ((g, i, p) for g in self.optimizer.param_groups for i, p in enumerate(g["params"]))
        return next((g, i) for g, i, p in places if p is of)

    def replace(self, name: str, values: Tensor, rows: list[int] | None = None, append: bool = False) -> None:
        """Another parameter, with some rows of the state as 3D Gaussian splatting does, or with none."""
        old = self.p[name]
        group, i = self.group(old)
        state = self.optimizer.state.pop(old, {})
        self.p[name] = new = torch.nn.Parameter(values.clone())
        new.grad = gradient(new, self.steps)
        if append:
            del group["params"][i]
            group["params"].append(new)
        else:
            group["params"][i] = new
        if rows is not None:
            self.optimizer.state[new] = {k: t[rows] if t.shape == old.shape else t for k, t in state.items()}

    def move(self, p: Any, to: dict[str, Any] | None = None) -> None:
        """To another group, but not the last of its own."""
        group, i = self.group(p)
        other = to or next(g for g in self.optimizer.param_groups if g is not group)
        if group is other or len(group["params"]) == 1:
            return
        for key in ("params", "param_names"):
            other[key].append(group[key].pop(i))
        for g in (group, other):
            g["weight_decay_mask"] = None

    def add_group(self, like: Any, seed: int) -> None:
        name = f"h{len(self.p)}"
        self.p[name] = p = torch.nn.Parameter(gradient(like, seed))
        p.grad_dtype, p.grad = None, gradient(p, seed + 1)
        self.optimizer.add_param_group({"params": [(name, p)], "lr": 0.3, "maximize": seed % 2 == 0})

    def fail(self, kind: type[Exception], *texts: str) -> None:
        with raises_unchanged(self.optimizer, kind, *texts):
            self.optimizer.step()

    def fail_in_a_hook(self) -> None:
        """Before the step, which then changes nothing, and after it, which then is whole."""

        def fail(*_: Any) -> None:
            raise KeyError("from a hook")

        handle = self.optimizer.register_step_pre_hook(fail)
        self.fail(KeyError, "from a hook")
        handle.remove()
        want = self.judge.expected(self.optimizer)
        handle = self.optimizer.register_step_post_hook(fail)
        with raises_with(KeyError, "from a hook"):
            self.optimizer.step()
        handle.remove()
        assert_same_bits(snapshot(self.optimizer), want)

    def interrupt(self, by: AbstractContextManager[Any]) -> list[bool]:
        """A step that is interrupted, or not: every parameter is whole, with its state. If it was, which
        of them are as they had to become."""
        before, want = snapshot(self.optimizer), self.judge.expected(self.optimizer)
        try:
            with by:
                self.optimizer.step()
        except (KeyboardInterrupt, MemoryError, RuntimeError):
            got, stepped = snapshot(self.optimizer), []
            for i, (p, state) in enumerate(zip(got["params"], got["states"])):
                old = before["states"][i]  # states are made, and steps become tensors, before the launch
                made = {k: torch.zeros_like(t) for k, t in state.items() if k not in old}
                old = {**old, **made, **({"step": torch.tensor(int(old["step"]))} if "step" in old else {})}
                stepped.append(same_bits([p, state], [want["params"][i], want["states"][i]]))
                assert stepped[i] or same_bits([p, state], [before["params"][i], old]), f"{i} is half stepped"
            return stepped
        assert_same_bits(snapshot(self.optimizer), want)
        return []

    def new_gradients(self, names: str | None = None) -> None:
        for i, (name, p) in enumerate(self.p.items()):
            given = p.requires_grad and (names is None or name in names)
            p.grad = gradient(p, 100 * self.steps + i) if given else None

    def step(self) -> None:
        self.steps += 1
        self.judge.step(self.optimizer, f"step {self.steps}")

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.new_gradients()
            self.step()


def same_bits(got: Any, want: Any) -> bool:
    try:
        assert_same_bits(got, want)
    except (AssertionError, pytest.fail.Exception):
        return False
    return True


CHANGES: dict[str, str] = {
    "nothing": "",
    # Gradients.
    "one gradient absent": "b.grad = None",
    "all gradients absent": "w.new_gradients('')",
    "gradients of one group": "w.new_gradients('defg')",
    "gradient of an empty one alone": "w.new_gradients('g')",
    "absent, then of another layout": "b.grad = None; w.step(); b.grad = gradient(b, 9).mT.contiguous().mT",
    "absent, then unaligned": "d.grad = None; w.step(); d.grad = gradient(torch.cat([d, d[:1]]), 9)[1:]",
    "absent, then another dtype": "x, d.grad = d.grad, None; w.step(); d.grad = x; recast(d, torch.float64)",
    "absent, its state moved": "b.grad = None; w.step(); s[b] = {k: t.clone() for k, t in s[b].items()}; "
    "w.step(); s[b]['exp_avg'] = s[b]['exp_avg'].flip(0); w.step(); b.grad = gradient(b, 9)",
    "absent, its state removed": "d.grad = None; w.step(); del s[d]; w.step(); d.grad = gradient(d, 9)",
    "absent, its memory elsewhere": "a.grad = None; w.step(); x, a.data = a.data, a.data[:0]; w.step(); "
    "a.data = x.clone(); w.step(); a.grad = gradient(a, 9)",
    "absent, its data another dtype": "f.grad = None; w.step(); f.data, x = f.data.double(), f.data; "
    "w.step(); f.data = x; f.grad = gradient(f, 9)",
    "absent by turns": "a.grad = None; w.step(); a.grad, b.grad = gradient(a, 9), None; w.step(); "
    "d.grad = None; w.step(); b.grad, d.grad = gradient(b, 9), gradient(d, 9)",
    "zeroed": "o.zero_grad(set_to_none=False)",
    "zeroed, some new": "o.zero_grad(); (a * c).sum().backward()",
    "zeroed by the module": "torch.nn.ParameterDict(w.p).zero_grad(); (a * c).sum().backward()",
    "accumulated": "(a * b).sum().backward(); (a * d[0]).sum().backward()",
    "gradient replaced": "w.kept.append(a.grad); a.grad = gradient(a, 77)",
    "gradient moved": "a.grad.data = a.grad.data.clone()",
    "gradient written": "a.grad.mul_(3)",
    "gradient expanded": "a.grad = a.grad[:1].expand(5, 5); d.grad = d.grad[:1].expand(130)",
    "gradient not contiguous": "a.grad = a.grad.t().contiguous().t()",
    "gradient with gaps": "d.grad = d.grad.repeat_interleave(2)[::2]",
    "gradient transposed in place": "a.grad.t_()",
    "gradient lazily negated": "x = d.grad.float(); "
    "d.grad = torch.complex(x, -x).conj().imag.to(d.grad.dtype)",
    "gradient at another alignment": "d.grad = torch.cat([d.grad[:1], d.grad])[1:]",
    "gradients exchanged": "a.grad, b.grad = b.grad, a.grad",
    "gradients exchanged with one outside": "a.grad, c.grad = c.grad, a.grad",
    "one gradient of two": "a.grad = b.grad",
    "gradients in a bucket": "bucket(a, b, d, e)",
    "gradients of another dtype": "recast(a, torch.float64); recast(b, torch.float16); "
    "recast(d, torch.bfloat16); recast(e, torch.float8_e4m3fn); recast(f, a.dtype)",
    # Parameters.
    "data replaced": "a.data = 2 * a.data.clone(); f.data = 2 * f.data.clone()",
    "data written": "a.data.mul_(0.5); d.data[:50] = 0",
    "data transposed": "a.data = a.data.t()",
    "data sliced": "a.data = torch.linspace(-1, 1, 63).to(a.dtype).view(7, 9)[1:6, 2:7]",
    "data exchanged": "a.data, b.data = b.data, a.data",
    "parameter swapped": "swap_tensors(a, torch.nn.Parameter(gradient(a, 7))); a.grad = gradient(a, 8)",
    "frozen, then not": "b.requires_grad_(not b.requires_grad).grad = None",
    "frozen with its gradient": "b.requires_grad_(False)",
    "parameter replaced with its state": "w.replace('a', a.data[[0, 3, 1, 1, 2]], rows=[0, 3, 1, 1, 2])",
    "parameter replaced without its state": "w.replace('d', gradient(torch.empty(150, dtype=d.dtype), 3))",
    "a parameter appended": "w.replace('a', gradient(a, 5), append=True)",
    # Groups.
    "parameters reordered": "[group['params'].reverse() for group in groups]",
    "parameter moved to another group": "w.move(d); w.move(f)",
    "a group's last in the next": "groups[0]['weight_decay_mask'] = groups[-1]['weight_decay_mask'] = None; "
    "w.step(); [groups[-1][k].insert(0, groups[0][k].pop()) "
    "for k in ('params', 'param_names') if len(groups[0][k]) > 1]",
    "group removed": "[s.pop(p) for p in groups[0]['params'] if len(groups) > 1]; del groups[:-1]",
    "groups reversed": "groups.reverse()",
    "groups another list": "o.param_groups = [dict(group) for group in groups]",
    "group added": "w.add_group(d, 6)",
    # States.
    "states removed": "del s[a], s[c], s[f]",
    "states cleared": "s.clear()",
    "states exchanged": "s[a], s[b] = s[b], s[a]",
    "states exchanged by new entries": "x, y = s.pop(a), s.pop(b); s[b], s[a] = x, y",
    "states exchanged with one outside": "s[a], s[c] = s[c], s[a]",
    "contents of states exchanged": "x, y = dict(s[a]), dict(s[b]); s[a].update(y); s[b].update(x)",
    "state given to another": "s[b] = s.pop(a)",
    "moments exchanged within a state": "s[a]['exp_avg'], s[a][nu] = s[a][nu], s[a]['exp_avg']",
    "moments replaced": "[s[p].update({k: s[p][k].flip(0)}) for p in (a, c, d) for k in s[p] if k != 'step']",
    "moments written": "s[a]['exp_avg'].zero_(); s[c][nu].copy_(s[a][nu])",
    "moments moved": "[setattr(t, 'data', t.data.clone()) for p in (a, c, d, f) for t in s[p].values()]",
    "moment transposed": "s[a]['exp_avg'] = s[a]['exp_avg'].mT.contiguous().mT",
    "moment transposed in place": "s[a]['exp_avg'].t_()",
    "storage of a state moved": "grow(s[a]['exp_avg'].untyped_storage())",
    "state another dict": "s[a] = {k: t.clone() for k, t in reversed(list(s[a].items()))}",
    "states another container": "o.state = dict(s); w.step(); s.clear()",
    "states in another order": "o.state = OrderedDict(s); s[a] = o.state[a] = dict(reversed(s[a].items())); "
    "o.state.move_to_end(a); o.state.move_to_end(g); w.step(); "
    "[(setattr(t, 'data', t.data.clone()), w.step()) for t in s[f].values()]",
    "a user's values in the state": "s[a]['note'] = 'mine'; s[b]['other'] = torch.ones(3)",
    "step shared by assignment": "s[b]['step'] = s[d]['step'] = s[f]['step'] = s[a]['step']",
    "step shared, one left out": "s[d]['step'] = s[a]['step']; a.grad = None",
    "step written": "s[a]['step'].add_(3)",
    "step written behind autograd": "s[a]['step'].data.add_(3)",
    "step written through an alias": "t = s[a]['step']; swap_tensors(t, t.data); t.add_(3)",
    "step replaced": "s[a]['step'] = torch.tensor(5); s[b]['step'] = 7; s[d]['step'] = torch.tensor(9.0)",
    "step at its end": "s[a]['step'].fill_(2**31 - 1)",
    # The optimizer.
    "loaded from itself": "o.load_state_dict(o.state_dict())",
    "loaded from an older snapshot": "w.kept.append(o.state_dict()); o.load_state_dict(w.kept[0])",
    "copied": "w.p, w.optimizer = copy.deepcopy((w.p, o)); w.new_gradients()",
    "pickled": "w.p, w.optimizer = pickle.loads(pickle.dumps((w.p, o))); w.new_gradients()",
    "unflattened": "o.unflatten()",
    "options of a group": "groups[0].update(lr=0.3, betas=(0.5, 0.75), maximize=True, weight_decay=0.2)",
    "options of another": "groups[1].update(lr=torch.tensor(0.01), eps=1e-3, weight_decay=0.0)",
    "an lr of zero": "groups[0].update(lr=0)",
    "betas in place": "groups[0]['betas'] = [0.9, 0.999]; w.step(); groups[0]['betas'][0] = 0.5",
    "nesterov": "'nesterov' in groups[0] and groups[0].update(nesterov=not groups[0]['nesterov'])",
    "masks": "groups[0].update(weight_decay=0.3, weight_decay_mask=[False, True, True])",
    "a mask in place": "groups[1]['weight_decay_mask'][0] ^= True",
    "a mask removed": "groups[1]['weight_decay_mask'] = None",
    "scaled": "o.grad_scale, o.found_inf = torch.tensor(3.0), torch.tensor(0.0)",
    "scaled once": "o.grad_scale = torch.tensor(3.0); w.step(); del o.grad_scale",
    "skipped": "o.found_inf = torch.tensor(1.0 - float(getattr(o, 'found_inf', 0.0)))",
    "skipped at a first step": "del s[a], s[c], s[f]; o.found_inf = torch.tensor(1.0)",
    "failed in a hook": "w.fail_in_a_hook()",
    "failed for a wrong lr": "lr = groups[1]['lr']; groups[1]['lr'] = -1.0; "
    "w.fail(ValueError, 'Invalid learning rate: -1.0'); groups[1]['lr'] = lr",
    "failed for a wrong gradient": "g, f.grad = f.grad, None; f.grad = f.detach().to_sparse(); "
    "w.fail(RuntimeError, 'is sparse'); f.grad = g",
}
"""Statements about the parameters a to g, the optimizer o, its groups and states s."""


def bucket(*params: Any) -> None:
    memory = torch.cat([p.grad.reshape(-1) for p in params])
    for p, part in zip(params, memory.split([p.numel() for p in params])):
        p.grad = part.view(p.shape)


def recast(p: Any, dtype: torch.dtype) -> None:
    p.grad_dtype = None  # any
    p.grad = (p.grad.double() / 3).to(dtype)


def grow(storage: Any) -> None:
    if not storage.resizable():
        pytest.skip("torch moves no flat slot: its storage is not resizable")
    before = storage.data_ptr()
    storage.resize_(2 * storage.nbytes() + (1 << 20))
    assert storage.data_ptr() != before


def do(w: World, statements: str) -> None:
    o = w.optimizer
    used = torch, copy, pickle, swap_tensors, gradient, bucket, recast, grow, freed, OrderedDict
    names = {**w.p, "w": w, "o": o, "s": o.state, "groups": o.param_groups, "nu": w.rule.nu}
    names |= {f.__name__: f for f in used}
    exec(statements, names)  # noqa: S102 (our own table)


TRITON = ("data transposed", "states exchanged with one outside", "step shared by assignment", "skipped")
"""Also in Triton's interpreter, which takes its time; how tensors are found is the same for all backends."""


def worlds() -> list[Any]:
    """Each change in both layouts and in every format, with addresses asked for in C++ and in Python, on cpu
    twice and on eager once; rules and how these meet take turns."""
    cases = []
    rules, formats = list(RULES), list(FORMATS)
    for i, name in enumerate(CHANGES):
        odd = i % 2 == 1
        kinds = [("cpu", False, odd), ("cpu", True, not odd), ("eager", odd, False)]
        for k, kind in enumerate(kinds):
            cases.append((name, rules[(i + k) % len(rules)], *kind, formats[(i + k) % len(formats)]))
        if name in TRITON and ALL_BACKENDS["triton"].why_not(torch.device("cpu")) is None:
            cases.append((name, rules[i % len(rules)], "triton", not odd, False, "fp32"))
    return cases


def hide_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses are asked for as where it was not built."""
    monkeypatch.setattr("fused_optim.addresses.extension", lambda name: (None, "hidden by the test"))


@pytest.mark.parametrize(("what", "rule", "backend", "flatten", "python", "format"), worlds())
def test_a_change_between_steps(
    what: str, rule: str, backend: str, flatten: bool, python: bool, format: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if python:
        hide_the_extension(monkeypatch)
    w = World(rule, backend, flatten, format)
    w.train(2)
    w.step()  # nothing is new
    do(w, CHANGES[what])  # gradients are those of the step before, where they were
    w.step()
    w.train(1)
    do(w, CHANGES[what])
    w.step()
    w.step()


NEGATED = {
    "parameter": "p.data = lazy",
    "gradient": "p.grad = lazy",
    "moment": "o.state[p]['exp_avg'].data = lazy",
}


@pytest.mark.parametrize("what", NEGATED)
@pytest.mark.parametrize("python", [False, True], ids=["", "python"])
def test_one_element_lazily_negated(what: str, python: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no gaps, and lies where what it negates does: nothing but its being lazy says so."""
    if python:
        hide_the_extension(monkeypatch)
    z = torch.complex(torch.tensor([1.5]), torch.tensor([2.5]))
    plain, lazy = z.imag, z.conj().imag
    assert (plain.data_ptr(), plain.stride()) == (lazy.data_ptr(), lazy.stride()) and lazy.is_neg()
    p, grad, moment = (torch.tensor([x, 0.0]).as_strided((1,), (2,)) for x in (0.3, 0.7, 0.2))
    p = torch.nn.Parameter(plain if what == "parameter" else p)
    p.grad = plain if what == "gradient" else grad
    o, judge = RULES["adamw"].optimizer([p], backend="cpu"), Judge(RULES["adamw"])
    judge.step(o)
    o.state[p]["exp_avg"] = plain if what == "moment" else moment
    for _ in range(2):
        judge.step(o)
    exec(NEGATED[what], {"p": p, "o": o, "lazy": lazy})  # noqa: S102 (our own table)
    for _ in range(2):
        judge.step(o)


# Which parameters have a gradient at each step


def patterns() -> dict[str, list[str]]:
    rng = random.Random(0)
    return {
        "alternating as in GANs": ["abc", "defg"] * 4,
        "late": ["a", "a", "ab", "ab", "abcd", "abcdefg", "abcdefg"],
        "experts without tokens": ["".join(n for n in "abcdefg" if rng.random() < 0.5) for _ in range(12)],
        "apart and together": ["abcdefg", "bd", "ace", "abcdefg", "acefg", "bd", "abcdefg"],
        "none": ["", "abcdefg", "", "", "abcdefg"],
    }  # fmt: skip


@pytest.mark.parametrize("pattern", patterns())
@pytest.mark.parametrize("backward", [False, True], ids=["assigned", "backward"])
def test_gradients_that_come_and_go(
    pattern: str, backend: str, flatten: bool, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = len(pattern) + 2 * backward + flatten
    if turn % 2:
        hide_the_extension(monkeypatch)
    w = World(list(RULES)[turn % len(RULES)], backend, flatten, list(FORMATS)[turn % len(FORMATS)])
    for i, names in enumerate(patterns()[pattern]):
        if not backward:
            w.new_gradients(names)
        else:
            w.optimizer.zero_grad()
            for name in names:
                (w.p[name] * gradient(w.p[name], i)).sum().backward()
        if pattern == "apart and together":
            w.optimizer.found_inf = torch.tensor(float(i % 3 == 1))
        w.step()


# Refused

REFUSED: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "freed parameter": ("freed(c)", ValueError, ("parameter 'c'", "memory")),
    "freed gradient": ("freed(d.grad)", ValueError, ("gradient of parameter", "memory")),
    "freed moment": ("freed(s[c]['exp_avg'])", ValueError, ("'exp_avg'", "'c'", "memory")),
    "freed second moment": ("freed(s[f][nu])", ValueError, ("'f'", "memory")),
    "freed step": ("freed(s[f]['step'])", ValueError, ("'step'", "memory")),
    "one moment of two": ("s[a]['exp_avg'] = s[b]['exp_avg']", ValueError, ("'a'", "'b'", "same tensor")),
    "one moment twice": ("s[f][nu] = s[f]['exp_avg']", ValueError, ("'f'", "same tensor")),
    "one state of two": ("s[a] = s[b]", ValueError, ("'a'", "'b'")),
    "overlapping parameters": ("b.data = a.data.view(5, 5)", ValueError, ("'a'", "'b'", "overlap")),
    "overlapping itself": ("c.data = c.data[:1, :1].expand(5, 5)", ValueError, ("'c'", "overlap")),
    "gradient's shape": ("a.grad.data = d.data[:3].clone()", RuntimeError, ("'a'", "(3,)", "(5, 5)")),
    "parameter's shape": ("c.data = c.data[:4].clone()", (RuntimeError, ValueError), ("'c'", "(4, 5)")),
    "both shapes": ("a.grad = None; a.data = a.data[:4].clone(); a.grad = a.data.clone()",
                    (RuntimeError, ValueError), ("'a'", "(4, 5)")),
    "moment's shape": ("s[c]['exp_avg'].data = s[c]['exp_avg'].data[:4]",
                       (RuntimeError, ValueError), ("'exp_avg'", "'c'", "(4, 5)")),
    "sparse gradient": ("a.grad = None; a.grad = a.detach().to_sparse()", RuntimeError,
                        ("'a'", "sparse", "dense")),
    "differentiable": ("groups[1]['differentiable'] = True", (RuntimeError, ValueError),
                       ("differentiable", "not supported")),
    "a parameter twice": ("groups[0]['params'].append(d)", ValueError, ("group",)),
    "a short mask": ("groups[1]['weight_decay_mask'].pop()", ValueError, ("weight_decay_mask", "3", "4")),
    **{
        f"state: {entry}": (f"s[a]{entry}", (RuntimeError, ValueError), ("'a'", entry.split("'")[1]))
        for entry in (
            *(f"['exp_avg'] = {value}" for value in ("None", "1.0", "'zeros'", "torch.zeros(3)")),
            *(f"['exp_avg'] = torch.zeros(5, 5, dtype=torch.{t})" for t in ("int32", "complex64", "uint8")),
            *(f"['step'] = {value}" for value in ("'three'", "-1", "2.5", "2**31", "torch.tensor(-3.0)")),
            "['remainder'] = torch.zeros(5, 5, dtype=torch.int32)",
        )
    },
}  # fmt: skip
"""What is done, and what a step then raises. A state without a step number starts anew."""


def freed(t: Tensor) -> None:
    try:
        t.untyped_storage().resize_(0)
    except RuntimeError:
        pytest.skip("torch frees no flat slot: its storage is not resizable")


def test_a_freed_state_without_a_gradient(flatten: bool) -> None:
    """A step leaves it alone; it is refused where it is saved, or stepped."""
    w = World("adamw", "cpu", flatten, "fp32")
    w.train(2)
    d, o = w.p["d"], w.optimizer
    gradient_of_d, d.grad, state = d.grad, None, o.state[d]
    freed(state.setdefault("exp_avg", state.pop("exp_avg").clone()))
    o.step()
    with raises_with(ValueError, "shape (130,)", "freed"):
        o.state_dict()
    d.grad = gradient_of_d
    with raises_with(ValueError, "'exp_avg'", "'d'", "freed"):
        o.step()


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize(("backend", "python"), [("cpu", False), ("eager", True)], ids=["", "python"])
def test_a_change_that_is_refused(
    what: str, backend: str, flatten: bool, python: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, and parameters whose memory is there are as they were."""
    if python:
        hide_the_extension(monkeypatch)
    statements, kind, texts = REFUSED[what]
    for fresh in (False, True):
        w = World("adabelief", backend, flatten, "fp32")
        w.train(3)
        if fresh:
            w.new_gradients()
        do(w, statements)
        alive = [p for p in w.p.values() if p.untyped_storage().nbytes()]
        before = [p.detach().clone() for p in alive]
        for _ in range(2):
            with raises_with(kind, *texts):
                w.optimizer.step()
        assert_same_bits([p.detach() for p in alive], before)


# Interrupted


class InterruptedWrite(TorchDispatchMode):
    """The write of this number, among those that PyTorch makes itself, is interrupted before it is made."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= str(func).split(".")[1].endswith("_")
        if self.left == 0:
            self.left = -1
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("backend", "format"), [("cpu", "fp32"), ("cpu", "8bit+split8"), ("eager", "bf16")])
def test_interrupted_in_a_write(backend: str, format: str, flatten: bool) -> None:
    """Whichever it is, of tables, copies or results; and the next steps are right."""
    w = World("adabelief", backend, flatten, format)
    w.train(1)
    w.new_gradients()
    with InterruptedWrite(-1) as counted:
        w.optimizer.step()
    assert -1 - counted.left > 3
    for number in range(1, -counted.left, 4 if backend == "eager" else 1):
        w = World("adabelief", backend, flatten, format)
        w.train(1)
        w.new_gradients()
        assert w.interrupt(InterruptedWrite(number))
        w.step()
        w.train(1)


@pytest.mark.parametrize(
    ("launch", "when"), [(2, "loaded"), (1, "before"), (1, "after"), (2, "before"), (2, "after")]
)
def test_interrupted_between_two_launches(
    monkeypatch: pytest.MonkeyPatch, backend: str, flatten: bool, launch: int, when: str
) -> None:
    """Or while what the second launch needs is loaded; and the next steps are right."""
    calls = {"step": 0, "load": 0}
    real = ALL_BACKENDS[backend]

    def step(batch: Any, inputs: Any) -> None:
        calls["step"] += 1
        if calls["step"] == launch and when == "before":
            raise KeyboardInterrupt
        real.step(batch, inputs)
        if calls["step"] == launch and when == "after":
            raise KeyboardInterrupt

    def load(*given: Any) -> None:
        calls["load"] += 1
        if calls["load"] == launch and when == "loaded":
            raise KeyboardInterrupt
        real.load(*given)

    monkeypatch.setitem(ALL_BACKENDS, backend, dataclasses.replace(real, step=step, load=load))
    for warm, format in enumerate(FORMATS):
        calls.update(step=10, load=10)
        w = World("adabelief", backend, flatten, format)
        w.train(warm)
        w.new_gradients("abcdef")  # without that of g, which needs a new plan
        calls.update(step=0, load=0)
        done = w.interrupt(nullcontext())[:-1]
        assert len(done) == 6
        assert any(done) == (when != "loaded" and (launch == 2 or when == "after"))
        assert all(done) == (launch == 2 and when == "after")
        for names in ("abcdefg", "bdf", "abcdefg"):
            w.new_gradients(names)
            w.step()
