"""The ``torch.optim.Optimizer`` contract: groups, state, ``step()``, checkpoints.

:class:`FusedOptimizer` knows no rule's arithmetic and no backend's; a subclass names its rule, and a
backend makes the step. A step goes: closure, hyperparameters, plan, launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, options
from .backends import Inputs, check_name, select
from .flat import FlatLayout
from .layout import check_no_overlap
from .memory import Memory, memory_of, nbytes
from .options import HyperparameterTable, WeightDecayMask
from .plan import Amp, Plan, Settings, make_plan
from .reference import MAX_COUNT
from .rules import RULES
from .storage import check_formats, plain_format
from .table import finish


class FusedOptimizer(torch.optim.Optimizer):
    r"""What AdaBelief, AdamaxW and AdamW share: everything but the rule. Not for direct use.

    Args:
        params: parameters, named parameters, or dicts of groups, of any mix of float32, float64,
            bfloat16, float16, complex64 and complex128, of any shape and layout.
        defaults: what a group holds unless it says otherwise. ``lr`` and ``weight_decay`` may be callables
            of the number of earlier ``step()`` calls.
        weight_decay_mask: which parameters decay: a callable of (name, parameter), a mapping from name to
            bool, or a list of bools in parameter order. Unnamed parameters are named by their number in
            their group.
        decoupled_lr: scale weight decay by ``lr / reference_lr`` (the group's first lr) in place of ``lr``
            (Loshchilov and Hutter).
        maximize: ascend.
        state_format: how moments are stored: ``"fp32"``, ``"bf16"`` (2 bytes each) or ``"8bit"`` (1 byte
            each, and one for every 128 elements), rounded so that their mean is right.
        master_weights: what keeps the bits of a bfloat16 parameter that its 16 cannot hold: None,
            ``"split16"`` (16 bits beside the parameter, together the exact float32) or ``"split8"`` (8 bits,
            a float32 of 24 bits). float32 and float64 parameters need none and have none.
        stochastic_rounding: round bfloat16 parameters up or down at the odds of what is cut off, instead of
            to nearest, where small updates are lost; see :attr:`seed`.
        flatten: move parameters, gradients and states into one contiguous buffer each; the tensors become
            views of them. Results are the same; see :meth:`unflatten`.
        backend: None for the best that the device has, or ``"triton"``, ``"cuda"``, ``"cpu"``, ``"eager"``.

    Moments are float32 for 16-bit parameters and ``state_format="fp32"``, else of the parameter's dtype.
    """

    rule: str
    """The subclass's name in :data:`~.rules.RULES`."""

    _step_supports_amp_scaling = True
    """``torch.amp.GradScaler`` hands over ``grad_scale`` and ``found_inf`` and lets the
    step unscale and skip, with no wait for the device."""

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        weight_decay_mask: WeightDecayMask | None,
        decoupled_lr: bool,
        formats: tuple[str, str | None, bool],
        flatten: bool,
        backend: str | None,
    ) -> None:
        check_name(backend)
        options.check_mask_type(weight_decay_mask)
        self._settings = Settings(
            RULES[self.rule], options.checked_formats(*formats), options.flag("flatten", flatten), backend
        )
        self._decoupled_lr = options.flag("decoupled_lr", decoupled_lr)
        self._mask, self._mask_used = weight_decay_mask, 0
        self._count = 0
        self._seed = 0
        self._reset()
        super().__init__(params, {**defaults, "differentiable": False})
        if isinstance(weight_decay_mask, (list, tuple)) and self._mask_used != len(weight_decay_mask):
            raise ValueError(
                f"weight_decay_mask has {len(weight_decay_mask)} entries for {self._mask_used} parameters"
            )
        options.check_mask_names(weight_decay_mask, self.param_groups)
        for device in {p.device for p in self._params() if p.device.type != "meta"}:
            select(backend, device)
        if flatten:
            self._flat.hold(p for p in self._params() if self._settings.can_be_flat(p))

    def _reset(self) -> None:
        """Forget all that can be worked out again."""
        self._plan: Plan | None = None
        self._flat = FlatLayout()
        self._hyper = HyperparameterTable()
        self._captured: list[Any] = []

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def seed(self) -> int:
        """Of the random bits of ``stochastic_rounding``, in [0, 2^32); 0 unless set, so that the
        replicas of data-parallel training round alike. Saved in the state dict."""
        return self._seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self._seed = options.whole_number("seed", seed, 2**32)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as :meth:`torch.optim.Optimizer.add_param_group`; ``lr`` and
        ``weight_decay`` may be callables, as in the constructor.

        Raises:
            ValueError, TypeError: a hyperparameter is out of range, or a parameter is
                given twice or overlaps another in memory. Nothing is added then.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        index = len(self.param_groups)
        group = {**self.defaults, **param_group}
        options.complete_group(group, index, self._count, self._decoupled_lr)
        options.check_twice(group["params"], self.param_groups)
        mask_used = self._mask_used
        super().add_param_group(group)
        try:
            self._complete_added(self.param_groups[index], index)
        except Exception:
            self.param_groups.pop()
            self._mask_used = mask_used
            raise

    def _complete_added(self, group: dict[str, Any], index: int) -> None:
        """What needs the group's parameters as torch has listed them."""
        mask = group.get("weight_decay_mask")
        if mask is None and isinstance(self._mask, (list, tuple)):
            first = self._mask_used
            self._mask_used += len(group["params"])
            mask = self._mask[first : self._mask_used]
        group["weight_decay_mask"] = options.mask_of(self._mask if mask is None else mask, group)
        for name, p in zip(options.names_of(self.param_groups, index), group["params"]):
            options.check_kind(name, p, self._settings.flatten)
            if plain_format(p.dtype) is not None:
                check_formats(name, p.dtype, *self._settings.formats)
        check_no_overlap([(f"parameter {name}", p) for name, p in options.named(self.param_groups)])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, else None.

        Raises:
            ValueError, TypeError, RuntimeError: a hyperparameter, parameter or gradient
                is wrong; the text names it. Nothing has changed then.
        """
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
        plan = self._current_plan((scale is not None, found_inf is not None), capturing)
        inputs = {d: Inputs.on(d, self._hyper.on(d), scale, found_inf) for d in plan.devices}
        try:
            for backend, batch in plan.batches:
                for o in batch.copied:
                    o.load_copies()
                try:
                    backend.step(batch, inputs[batch.key.device])
                finally:
                    finish(batch.store_copies)
        finally:
            # A backward pass through an older graph must notice, whatever interrupted the loop.
            torch.autograd.graph.increment_version(plan.versioned)
        if capturing:
            self._keep_captured(plan)
        self._count = min(self._count + 1, MAX_COUNT)
        return loss

    def _current_plan(self, amp: Amp, capturing: bool) -> Plan:
        # Forgotten until it is whole: an interrupted refresh leaves rows with addresses of before.
        plan, self._plan = self._plan, None
        if plan is None or not plan.refresh(self.param_groups, self.state, self._seed, amp):
            if capturing:
                raise RuntimeError(
                    "a step that is captured into a CUDA graph must be like the one before it, which made "
                    "the states and loaded the kernels: make a step with these parameters, gradients, states, "
                    "grad_scale and found_inf before the capture"
                )
            plan = make_plan(self.param_groups, self.state, self._settings, self._seed, amp, self._flat)
        self._plan = plan
        return plan

    def _keep_captured(self, plan: Plan) -> None:
        """Keep for good what a CUDA graph reads, and do not use it again: what was uploaded
        during the capture gets its values when the graph is replayed, and not before."""
        self._captured += [plan, self._hyper.on_device, *(batch.on_device for _, batch in plan.batches)]
        self._hyper.on_device = {}
        for _, batch in plan.batches:
            batch.on_device = {}

    def unflatten(self) -> None:
        """Give every parameter, gradient and state memory of its own, and step them so from now on.

        For code that saves or shares single parameters, and so meets the whole of ``flatten=True``'s
        buffers: ``safetensors.torch.save_model``, ``torch.save`` of a part, ``share_memory_()``.
        """
        checkpoint.unflatten(self._params(), self.state)
        self._settings = replace(self._settings, flatten=False)
        self._plan, self._flat = None, FlatLayout()

    def memory(self) -> Memory:
        """Bytes of parameters, gradients, moments, master weights and metadata as they are now.

        Example:
            >>> import torch
            >>> from fused_optim import AdamaxW
            >>> model = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
            >>> optimizer = AdamaxW(model.parameters(), state_format="8bit", master_weights="split8")
            >>> model(torch.ones(2, 64, dtype=torch.bfloat16)).sum().backward()
            >>> optimizer.step()
            >>> memory = optimizer.memory()
            >>> {part: round(memory.per_parameter()[part], 2) for part in ("parameters", "moments", "master")}
            {'parameters': 2.0, 'moments': 2.02, 'master': 1.0}
        """
        beside = [*self._hyper.on_device.values()]
        for _, batch in self._plan.batches if self._plan else ():
            beside += batch.tensors()
        padding = sum(buffers.padding_bytes for buffers in self._flat.buffers)
        return memory_of(self._params(), self.state, nbytes(*beside) + padding)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers and tensors, as :meth:`torch.optim.Optimizer.state_dict`: a
        snapshot, in which every tensor is a copy. Each parameter has a ``step`` of its own in it.

        Beside torch's keys it has ``"count"``, the number of ``step()`` calls that schedules see, and
        with ``stochastic_rounding`` the ``"seed"``. Callables are left out.
        """
        seed = self._seed if self._settings.formats.stochastic_rounding else None
        return checkpoint.snapshot(super().state_dict(), self._count, seed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, here or from another optimizer with the
        same state keys (``torch.optim.Adamax`` for AdamaxW, ``torch.optim.AdamW`` for AdamW,
        AdaBelief ports for AdaBelief).

        Moments take this optimizer's format and layout, ``step`` becomes an integer, and
        nothing aliases ``state_dict``. What another optimizer did otherwise is warned of.

        Raises:
            ValueError: a state lacks a key or has another shape; names both. The
                optimizer keeps its old state.
        """
        old = self.param_groups
        loaded: list[checkpoint.Loaded] = []

        def check(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            loaded.append(checkpoint.read(saved, old, self._settings, self._decoupled_lr))
            return {**saved, "param_groups": loaded[0].groups, "state": {}}

        def install(_: torch.optim.Optimizer) -> None:
            checkpoint.keep_schedules(old, self.param_groups)
            self.state.update(loaded[0].states)
            self._count = loaded[0].count
            self._seed = self._seed if loaded[0].seed is None else loaded[0].seed

        # torch's own method casts moments to the parameter's dtype and cannot be told not to.
        handles = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(install, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_settings", "_decoupled_lr", "_mask", "_mask_used", "_count", "_seed")
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_settings" in state:
            self._reset()
        self._plan = None
