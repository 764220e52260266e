"""The ``torch.optim.Optimizer`` contract: groups, state, ``step()``, checkpoints. A subclass names its rule,
and a backend makes the step. A step goes: closure, hyperparameters, plan, launch."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, options
from .backends import Inputs, select
from .flat import FlatLayout
from .plan import Plan, Settings
from .reference import MAX_COUNT
from .rules import RULES
from .state import bytes_in_use, own
from .table import finish


class FusedOptimizer(torch.optim.Optimizer):
    r"""What AdaBelief, AdamaxW and AdamW share: everything but the rule. Not for direct use.

    What is wrong with an argument is a ValueError or TypeError, a backend that was named and is not available
    a RuntimeError; they name what was given and what is right.

    Args:
        params: parameters, named parameters, or dicts of groups, of any mix of float32, float64,
            bfloat16, float16, complex64 and complex128, of any shape and layout.
        defaults: what a group holds unless it says otherwise.
        weight_decay_mask: which parameters decay: a callable of (name, parameter), a mapping from name to
            bool, or a list of bools. Parameters without a name have their number in their group for one.
        decoupled_lr: scale weight decay by ``lr / reference_lr`` (the group's first lr) in place of ``lr``
            (Loshchilov and Hutter).
        maximize: ascend.
        state_format: how moments are stored: ``"fp32"`` (float64 for such parameters), ``"bf16"`` or
            ``"8bit"`` (2 and 1 bytes each), rounded so that their mean is right.
        master_weights: what keeps the bits that a bfloat16 parameter cannot hold: None, ``"split16"`` (16
            beside the parameter, together the exact float32) or ``"split8"`` (8, a float32 of 24 bits).
        stochastic_rounding: round bfloat16 parameters up or down at the odds of what is cut off, instead of
            to nearest, where small updates are lost; see :attr:`seed`.
        flatten: move parameters, gradients and states into contiguous buffers, with the same results; the
            tensors stay in them until :meth:`unflatten`, or until somebody replaces their data.
        backend: None for the best that the device has, or ``"triton"``, ``"cuda"``, ``"cpu"``, ``"eager"``.
    """

    rule: str  # the subclass's name in RULES
    _step_supports_amp_scaling = True  # torch.amp.GradScaler lets the step unscale and skip, with no wait

    def __init__(
        self, params: Any, defaults: dict[str, Any], formats: tuple[str, str | None, bool],
        weight_decay_mask: options.WeightDecayMask | None, decoupled_lr: bool, flatten: bool,
        backend: str | None,
    ) -> None:  # fmt: skip
        options.check_choices(*formats)
        self._settings = Settings(RULES[self.rule], formats, options.flag("flatten", flatten), backend)
        self._decoupled_lr = options.flag("decoupled_lr", decoupled_lr)
        self._mask = weight_decay_mask
        self._count = self._seed = 0
        self._reset()
        super().__init__(params, {**defaults, "differentiable": False})
        options.check_mask(weight_decay_mask, self.param_groups)
        for device in {p.device for p in self._params() if p.device.type != "meta"}:
            select(backend, device)
        if flatten:
            self._flat.hold(p for p in self._params() if self._settings.can_be_flat(p))

    def _reset(self) -> None:  # to what can be worked out again
        self._plan: Plan | None = None
        self._flat = FlatLayout()
        self._hyper = options.HyperparameterTable()
        self._captured: list[Any] = []

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def seed(self) -> int:
        """Of ``stochastic_rounding``, in [0, 2^32). Saved. 0 unless set, so that replicas round alike."""
        return self._seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self._seed = options.whole_number("seed", seed, 2**32)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as :meth:`torch.optim.Optimizer.add_param_group`; errors are the constructor's, and
        nothing is added then."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        group, settings = {**self.defaults, **param_group}, self._settings
        whole = {"flatten": settings.flatten, "backend": settings.backend, "decoupled_lr": self._decoupled_lr}
        whole |= zip(options.FORMATS, settings.formats)
        # ZeroRedundancyOptimizer puts the constructor's arguments into groups as well.
        group = {key: value for key, value in group.items() if key not in whole or value != whole[key]}
        options.complete_group(group, len(self.param_groups), self._count, self._decoupled_lr)
        earlier = len(self._params())
        self._settings.check_new(group, self.param_groups)
        super().add_param_group(group)
        try:
            added = self.param_groups[-1]
            added["weight_decay_mask"] = options.mask_of(self._mask, added, earlier)
        except Exception:
            self.param_groups.pop()
            raise

    # In a compiled train step this call is a graph break.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one optimization step, and return what ``closure`` returned, if there is one. What is wrong
        with a hyperparameter, parameter, gradient or state is a ValueError, TypeError or RuntimeError that
        names it, and nothing has changed then."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if capturing:
            options.check_capture(self.param_groups)
        options.run_schedules(self.param_groups, self._count)
        self._hyper.read(self.param_groups)
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        given = (self._seed, scale is not None, found_inf is not None)
        # Forgotten until it is whole: an interrupted refresh leaves rows with addresses of before.
        plan, self._plan = self._plan, None
        if plan is None or not plan.refresh(self.param_groups, self.state, given):
            if capturing:
                raise RuntimeError(
                    "a step that a CUDA graph captures must be like the one before it: make one before with "
                    "these parameters, gradients, states, grad_scale and found_inf"
                )
            plan = Plan(self.param_groups, self.state, self._settings, given, self._flat)
        self._plan = plan
        inputs = {d: Inputs.on(d, self._hyper.on(d), scale, found_inf) for d in plan.devices}
        try:
            for backend, batch in plan.batches:
                batch.load_copies()
                try:
                    backend.step(batch, inputs[batch.key.device])
                finally:
                    finish(batch.store_copies)
        finally:
            # A backward pass through an older graph must notice, whatever interrupted the loop.
            torch.autograd.graph.increment_version(plan.versioned)
        if capturing:
            # The graph reads these at each replay. What was uploaded gets its values then, and not before,
            # so that other steps need tables of their own.
            self._captured += [plan, self._hyper.on_device, *(batch.on_device for _, batch in plan.batches)]
            self._hyper.on_device = {}
            for _, batch in plan.batches:
                batch.on_device = {}
        self._count = min(self._count + 1, MAX_COUNT)
        return loss

    def unflatten(self) -> None:
        """Give every parameter, gradient and state memory of its own, for code that frees or shares single
        parameters (``share_memory_()``), and so that a parameter that is kept keeps no more than itself."""
        for p in self._params():
            p.data, p.grad = own(p), own(p.grad)
            state = self.state.get(p, {})
            state.update({key: own(value) for key, value in state.items() if key != "step"})
        self._settings = replace(self._settings, flatten=False)
        self._plan, self._flat = None, FlatLayout()

    def memory(self) -> dict[str, int]:
        """Bytes that are in use now, by purpose: ``parameters``, ``gradients``, ``moments`` (block exponents
        included), ``master`` (the remainders of split parameters) and ``metadata`` (step numbers, tables of
        addresses, dense copies).

        Example:
            >>> from fused_optim import AdamaxW
            >>> weight = torch.ones(64, 64, dtype=torch.bfloat16, requires_grad=True)
            >>> optimizer = AdamaxW([weight], state_format="8bit", master_weights="split8")
            >>> weight.sum().backward()
            >>> optimizer.step()
            >>> {part: n // weight.numel() for part, n in optimizer.memory().items()}
            {'parameters': 2, 'gradients': 2, 'moments': 2, 'master': 1, 'metadata': 0}
        """
        batches = self._plan.batches if self._plan else []
        tables = [*self._hyper.on_device.values(), *(t for _, batch in batches for t in batch.tensors())]
        return bytes_in_use(self._params(), self.state, tables)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers and tensors, as :meth:`torch.optim.Optimizer.state_dict`: a
        snapshot, in which every tensor is a copy. Beside torch's keys it has ``"count"``, the number of
        ``step()`` calls that schedules see, and with ``stochastic_rounding`` the ``"seed"``. Callables are
        left out."""
        seed = self._seed if self._settings.formats[2] else None
        return checkpoint.snapshot(super().state_dict(), self._count, seed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, here or from another optimizer with the same state keys.

        Moments take this optimizer's format and layout, ``step`` becomes an integer, and nothing aliases
        ``state_dict``. What another optimizer did otherwise is warned of. A state that lacks a key or has
        another shape is a ValueError that names both, and nothing has changed then.
        """
        old = self.param_groups
        loaded: list[checkpoint.Loaded] = []

        def check(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            loaded.append(checkpoint.read(saved, old, self._settings, self._decoupled_lr))
            return {**saved, "param_groups": loaded[0][0], "state": {}}

        def install(_: torch.optim.Optimizer) -> None:
            checkpoint.keep_schedules(old, self.param_groups)
            states, self._count, seed = loaded[0][1:]
            self.state.update(states)
            self._seed = self._seed if seed is None else seed

        # torch's own method casts moments to the parameter's dtype and cannot be told not to.
        with ExitStack() as hooks:
            hooks.callback(self.register_load_state_dict_pre_hook(check).remove)
            hooks.callback(self.register_load_state_dict_post_hook(install, prepend=True).remove)
            super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_settings", "_decoupled_lr", "_mask", "_count", "_seed")
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_settings" in state:
            self._reset()
        self._plan = None
