"""Random models through random histories: the step after every event must give what :class:`helpers.Judge`
works out on copies. It knows no plan, no address and nothing of earlier steps.

Hypothesis shrinks a failure to the fewest parameters and events. ``FUSED_OPTIM_SEQUENCES`` says how many
histories there are: 200, or 10,000 in ``make test-long``.
"""

import contextlib
import copy
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from helpers import (  # isort: skip
    BF16, F16, F32, F64, RULES, Judge, assert_same_bits, generated, gradient, raises_with, snapshot,
)  # fmt: skip
from hypothesis import strategies as st
from test_backends import LAYOUTS, outside, special_values, tensors, threads
from test_changes import InterruptedWrite, World, bucket, hide_the_extension
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR
from torch.utils import swap_tensors

from fused_optim.layout import is_dense

SEQUENCES = int(os.environ.get("FUSED_OPTIM_SEQUENCES", "200"))
BATCHES = 8  # of sequences, which the workers of pytest-xdist share
WIDE = [F32, F64, torch.complex64, torch.complex128]
OPTIONS: list[tuple[list[torch.dtype], dict[str, Any]]] = [
    ([*WIDE, BF16, F16], {}),
    ([F32, BF16, F16], {"state_format": "bf16"}),
    ([F32, BF16, F16], {"state_format": "8bit"}),
    ([*WIDE, BF16], {"master_weights": "split16"}),
    ([*WIDE, BF16], {"master_weights": "split8"}),
    ([*WIDE, BF16], {"stochastic_rounding": True}),
    ([F32, BF16], {"state_format": "8bit", "master_weights": "split8"}),
    ([F32, BF16], {"state_format": "bf16", "stochastic_rounding": True}),
]
"""The dtypes that parameters have, and what the optimizer is asked for."""
TENSORS = [(shape, layout) for shape, layout, _ in tensors(64)]
pytestmark = pytest.mark.filterwarnings("ignore:grad and param do not obey:UserWarning")  # torch's
MOVED = ("unaligned", "every third", "guarded")


class Model(World):
    """Parameters as they were drawn, in one to three groups; World has the steps and their judge.

    Args:
        drawn: of each parameter the dtype, shape with layout, and group, as numbers, and whether it lies in
            memory that several share.
    """

    def __init__(
        self, drawn: list[tuple[int, int, int, bool]], options: int, rule: str, backend: str, flatten: bool
    ) -> None:
        dtypes, chosen = OPTIONS[options]
        self.rule, self.steps, self.kept = RULES[rule], 0, []
        self.p: dict[str, Any] = {}
        self.memory: list[tuple[Tensor, Tensor]] = []
        shared = torch.full((8192 * len(drawn),), 77, dtype=torch.uint8)
        unused = torch.ones_like(shared, dtype=torch.bool)
        groups: dict[int, list[Any]] = {}
        for i, (dtype, tensor, group, together) in enumerate(drawn):
            shape, layout = TENSORS[tensor]
            values = gradient(torch.empty(shape, dtype=dtypes[dtype % len(dtypes)]), i)
            if together:
                place = slice(8192 * i, 8192 * i + values.nbytes)
                unused[place] = False
                values = shared[place].view(values.dtype).view(shape).copy_(values)
            self.p[f"p{i}"] = p = torch.nn.Parameter(values if together else self.laid_out(values, layout))
            groups.setdefault(group, []).append((f"p{i}", p))
        self.memory.append((shared, unused))
        self.judge = Judge(self.rule, **chosen)
        self.optimizer = self.rule.optimizer(
            [{"params": params} for params in groups.values()], lr=0.02, weight_decay=0.1,
            backend=backend, flatten=flatten, **self.rule.options, **chosen,
        )  # fmt: skip
        self.may_cast = not {"master_weights", "stochastic_rounding"} & chosen.keys()
        self.new_gradients()

    @property
    def stepped(self) -> list[Any]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def live(self) -> list[Any]:
        return [p for p in self.stepped if p.grad is not None]

    def laid_out(self, values: Tensor, layout: str) -> Tensor:
        values = LAYOUTS[layout](values)
        self.memory.append(outside(values))
        return values

    def step(self) -> None:
        """As judged; autograd is told, and no gradient is written nor memory between elements."""
        live = self.live
        grads, versions = [p.grad.clone() for p in live], [p._version for p in live]
        super().step()
        assert_same_bits([p.grad for p in live], grads, "gradients")
        assert all(p._version > version for p, version in zip(live, versions)), "autograd was not told"
        assert all(bool((memory[mask] == 77).all()) for memory, mask in self.memory), "written outside"

    def step_within(self, context: contextlib.AbstractContextManager[Any]) -> None:
        with context:
            self.step()

    def new_gradients(self, names: str | None = None) -> None:
        for p in self.p.values():
            p.grad_dtype = None  # any
        super().new_gradients(names)

    def with_own_gradients(self, params: list[Any]) -> list[Any]:
        """Those that autograd can add to: not frozen, and no two elements of a gradient share memory."""
        for p in params:
            if p.grad is not None and not is_dense(p.grad):
                p.grad = p.grad.clone(memory_format=torch.contiguous_format)
        return [p for p in params if p.requires_grad]

    def backward(self, params: list[Any], seed: int) -> None:
        params = self.with_own_gradients(params)
        if params:
            torch.autograd.backward(params, [gradient(p, seed) for p in params])

    def load_an_older_one(self) -> None:
        """What does not fit changes nothing; nor does what a warning, an error here, says of other names."""
        self.kept.append(self.optimizer.state_dict())
        before = snapshot(self.optimizer)
        try:
            self.optimizer.load_state_dict(self.kept[0])
        except (ValueError, UserWarning):
            assert_same_bits(snapshot(self.optimizer), before)

    def free(self, p: Any) -> None:
        """The memory of a parameter is freed, which a step refuses, and comes back, perhaps elsewhere."""
        storage, before = p.untyped_storage(), snapshot(self.optimizer)
        if p.grad is None or p.numel() == 0 or not storage.resizable():  # flat slots are not
            return
        contents, size = torch.empty(0, dtype=torch.uint8).set_(storage).clone(), storage.nbytes()
        storage.resize_(0)
        with raises_with(ValueError, "memory"):
            self.optimizer.step()
        storage.resize_(size)
        torch.empty(0, dtype=torch.uint8).set_(storage).copy_(contents)
        assert_same_bits(snapshot(self.optimizer), before)


@contextlib.contextmanager
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(F64)
    try:
        yield
    finally:
        torch.set_default_dtype(F32)


EVENTS: dict[str, str] = {
    "nothing": "",
    # Gradients.
    "new": "w.new_gradients()",
    "some": "[setattr(x, 'grad', None) for k, x in enumerate(w.stepped) if n >> k % 10 & 1]",
    "absent": "p.grad = None",
    "late": "p.grad = gradient(p, n)",
    "zero": "p.grad = torch.zeros_like(p)",
    "zeroed": "w.with_own_gradients(w.live); o.zero_grad(set_to_none=False)",
    "zeroed, some new": "o.zero_grad(); w.backward(w.stepped[n % 5 :: 2], n)",
    "accumulated": "w.backward(w.stepped[n % 5 :: 2], n)",
    "expanded": "p.shape and p.shape[0] and setattr(p, 'grad', gradient(p, n)[:1].expand(p.shape))",
    "not contiguous": "p.grad = LAYOUTS[MOVED[n % 3]](gradient(p, n))",
    "moved": "p.grad is not None and setattr(p.grad, 'data', p.grad.data.clone())",
    "written": "p.grad is not None and w.with_own_gradients([p]) and p.grad.mul_(3)",
    "exchanged": "p.grad, q.grad = q.grad, p.grad",
    "one of two": "p.grad = q.grad",
    "a bucket": "w.new_gradients(); bucket(*(x for x in {p, *w.live} if x.dtype == p.dtype "
    "and x.grad is not None)) if p.grad is not None else None",
    "another dtype": "p.is_complex() or setattr(p, 'grad', gradient(p, n).to((F64, F32, BF16, F16)[n % 4]))",
    "special": "x = special_values(p.real.dtype); p.grad = x[n % 11].to(p.dtype).expand(p.shape).clone()",
    # Parameters.
    "data replaced": "p.data = 2 * p.data.clone()",
    "data elsewhere": "p.data = w.laid_out(p.data, MOVED[n % 3])",
    "data written": "p.data.mul_(0.5)",
    "data exchanged": "p.data, q.data = q.data, p.data",
    "swapped": "swap_tensors(p, torch.nn.Parameter(gradient(p, n))); w.new_gradients()",
    "freed and restored": "w.free(p)",
    "frozen, or not": "p.requires_grad_(not p.requires_grad).grad = None",
    "cast": "w.may_cast and p.dtype in (F32, BF16) and "
    "(setattr(p, 'grad', None), setattr(p, 'data', p.data.to(BF16 if p.dtype == F32 else F32)))",
    "to": "torch.nn.ParameterList(w.stepped).to(memory_format=torch.channels_last)",
    # Groups.
    "added": "w.add_group(w.stepped[n % len(w.stepped)], n)",
    "group removed": "len(groups) > 1 and [s.pop(x, 0) for x in groups.pop(n % len(groups))['params']]",
    "groups reversed": "groups.reverse()",
    "groups another list": "o.param_groups = [dict(group) for group in groups]",
    "reordered": "group['params'].reverse()",
    "moved to another group": "w.move(p, groups[n % len(groups)])",
    # States.
    "removed": "s.pop(p, None)",
    "cleared": "s.clear()",
    "states exchanged": "x, y = s.pop(p, {}), s.pop(q, {}); s[q] = x; s[p] = x if p is q else y",
    "state given away": "p in s and p is not q and s.update({q: s.pop(p)})",
    "moments replaced": "p in s and s[p].update({k: x.clone() for k, x in s[p].items() if 'exp' in k})",
    "moments written": "'exp_avg' in s.get(p, ()) and s[p]['exp_avg'].zero_()",
    "moments elsewhere": "'exp_avg' in s.get(p, ()) and "
    "setattr(s[p]['exp_avg'], 'data', LAYOUTS[MOVED[n % 3]](s[p]['exp_avg']))",
    "another dict": "p in s and s.update({p: dict(reversed(s[p].items()))})",
    "a user's": "p in s and s[p].update(note='mine')",
    "step written": "'step' in s.get(p, ()) and torch.as_tensor(s[p]['step']).add_(n)",
    "step replaced": "p in s and s[p].update(step=(torch.tensor(n), n, torch.tensor(float(n)))[n % 3])",
    "step shared": "'step' in s.get(q, ()) and s[p].update(step=s[q]['step'])",
    "step at its end": "p in s and s[p].update(step=torch.tensor(2**31 - 2))",
    # The optimizer.
    "loaded": "o.load_state_dict(o.state_dict())",
    "loaded late": "w.load_an_older_one()",
    "copied": "w.p, w.optimizer = copy.deepcopy((w.p, o)); w.new_gradients()",
    "pickled": "w.p, w.optimizer = pickle.loads(pickle.dumps((w.p, o))); w.new_gradients()",
    "unflattened": "o.unflatten()",
    "options": "group.update(lr=0.3, betas=(0.5, 0.75), maximize=n % 2 == 0, weight_decay=0.2)",
    "other options": "group.update(lr=torch.tensor(0.01), eps=1e-3, weight_decay=0.0, betas=[0.0, 0.0])",
    "no lr": "group.update(lr=0)",
    "nesterov": "'nesterov' in group and group.update(nesterov=not group['nesterov'])",
    "a mask": "group['weight_decay_mask'] = [bool(n >> k % 10 & 1) for k in range(len(group['params']))]",
    "a scheduler": "x = ExponentialLR(o, 0.5); w.step(); x.step()",
    "a scheduler of betas": "x = OneCycleLR(o, 0.1, total_steps=4); w.step(); x.step()",
    "scaled": "o.grad_scale, o.found_inf = torch.tensor(3.0), torch.tensor(0.0)",
    "skipped": "o.found_inf = torch.tensor(1.0 - float(getattr(o, 'found_inf', 0.0)))",
    # What is around a step, and what fails in it.
    "threads": "w.step_within(threads(1 + n % 4))",
    "default dtype": "w.step_within(float64_by_default())",
    "inference mode": "w.step_within(torch.inference_mode())",
    "a hook fails": "w.fail_in_a_hook()",
    "interrupted": "w.interrupt(InterruptedWrite(1 + n % 40))",
    "a wrong lr": "x = groups[-1]['lr']; groups[-1]['lr'] = -1.0; "
    "w.fail(ValueError, 'Invalid learning rate: -1.0'); groups[-1]['lr'] = x",
    "a wrong gradient": "x = w.stepped[-1]; y, x.grad = x.grad, None; x.grad = x.detach().to_sparse(); "
    "w.fail(RuntimeError, 'is sparse'); x.grad = None; x.grad = y",
}
"""Statements about the optimizer o, its groups and states s, a parameter p and its group, another one q of
p's shape and dtype (or p itself), and a number n."""
COMPILED = {name: compile(statements, name, "exec") for name, statements in EVENTS.items()}


def do(w: Model, name: str, which: int, n: int) -> None:
    o, p = w.optimizer, w.stepped[which % len(w.stepped)]
    like = [x for x in w.stepped if x is not p and (x.shape, x.dtype) == (p.shape, p.dtype)]
    names = {"w": w, "o": o, "s": o.state, "groups": o.param_groups, "group": w.group(p)[0], "n": n, "p": p}
    used = {
        f.__name__: f for f in (torch, copy, pickle, swap_tensors, gradient, bucket, special_values, threads)
    }
    used |= {f.__name__: f for f in (ExponentialLR, OneCycleLR, InterruptedWrite, float64_by_default)}
    constants = {"LAYOUTS": LAYOUTS, "MOVED": MOVED, "F16": F16, "F32": F32, "F64": F64, "BF16": BF16}
    exec(COMPILED[name], used | constants | names | {"q": like[n % len(like)] if like else p})  # noqa: S102


NUMBER = st.integers(0, 1023)
PARAMETERS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 3) | st.integers(0, len(TENSORS) - 1), st.integers(0, 2),
              st.booleans()), min_size=1, max_size=30,
)  # fmt: skip
HISTORIES = st.integers(1, 16).flatmap(
    lambda n: st.lists(st.tuples(st.sampled_from(list(EVENTS)), NUMBER, NUMBER), min_size=n, max_size=n)
)
SETTINGS = st.tuples(
    st.integers(0, len(OPTIONS) - 1), st.sampled_from(list(RULES)),
    st.sampled_from([("cpu", False), ("cpu", True), ("eager", False)]), st.booleans(),
)  # fmt: skip


@pytest.mark.parametrize("batch", range(BATCHES))
def test_histories(batch: int, record_property: Callable[[str, object], None]) -> None:
    def check(drawn: Any, settings: Any, history: Any) -> None:
        options, rule, (backend, python), flatten = settings
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("fused_optim.backends.native.CPU_CHUNK", 256)  # or small models have one thread
            if python:
                hide_the_extension(patched)
            w = Model(drawn, options, rule, backend, flatten)
            w.step()
            for event in history:
                do(w, *event)
                w.step()

    n = generated(check, SEQUENCES // BATCHES, batch, PARAMETERS, SETTINGS, HISTORIES)
    record_property("sequences of events", n)
