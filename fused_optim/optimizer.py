"""The ``torch.optim.Optimizer`` contract: groups, state, ``step()``, checkpoints. A subclass names its rule,
and a backend makes the step. A step goes: closure, hyperparameters, plan, launch. A gradient's address goes
through ``Plan.refresh``, ``Addresses.ask``, its C++, ``Batch.follow`` where it has moved, the backend's
``step`` and the launch."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_dynamo_compiling

from . import checkpoint, options
from .backends import select, valid_now
from .flat import FlatLayout
from .plan import Plan, Settings
from .reference import MAX_COUNT
from .rules import RULES
from .surgery import StateAccess
from .table import finish


class FusedOptimizer(StateAccess):
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
        unscale_in_step: have ``torch.amp.GradScaler`` leave unscaling and skipping to the step, which needs
            neither a wait for the device nor a pass over the gradients. Off, the scaler does both, and
            trainers clip in between (Lightning refuses to clip for an optimizer that unscales).
            ``grad_scale`` and ``found_inf``, set as attributes by the caller, count either way.
        flatten: move parameters, gradients and states into contiguous buffers, with the same results; the
            tensors stay in them until :meth:`unflatten`, or until somebody replaces their data.
        backend: None for the best that the device has, or ``"triton"``, ``"cuda"``, ``"cpu"``, ``"eager"``.
        foreach, fused, capturable: taken, since factories pass them, and without effect: every step is fused,
            and one on a GPU can be captured.
        amsgrad, differentiable: must be False.
        max_grad_norm: clip all gradients together to this Euclidean norm, as
            ``torch.nn.utils.clip_grad_norm_`` does, after ``grad_scale`` and inside the step: gradients stay
            as they are. None does not clip; infinity works out :attr:`grad_norm` alone. DTensors on one mesh
            have one norm; what shards plain tensors (ZeroRedundancyOptimizer, DeepSpeed) must clip itself.
        skip_nonfinite: where that norm is infinite or NaN, change nothing, and count in :attr:`skipped`. Else
            gradients become 0 or NaN then, as in torch.

    Attributes:
        grad_norm: of the last step's gradients, before they were clipped: a 0-dim float64 tensor on the
            device of the first that has one. None before the first step, or where neither option asks for it.
        skipped: the number of steps that ``skip_nonfinite`` skipped since this optimizer was made, as a 0-dim
            int64 tensor, after a step on the same device; None without that option.
    """

    rule: str  # the subclass's name in RULES
    grad_norm: Tensor | None = None
    skipped: Tensor | None

    def __init__(
        self, params: Any, formats: tuple[str, str | None, bool], mask: options.WeightDecayMask | None,
        decoupled_lr: bool, max_grad_norm: float | None, skip_nonfinite: bool, unscale_in_step: bool,
        flatten: bool, backend: str | None, torchs: tuple[Any, ...], **defaults: Any,
    ) -> None:  # fmt: skip
        options.check_choices(*formats)
        options.check_torchs(dict(zip(options.TORCHS, torchs)))
        self._settings = Settings(
            RULES[self.rule], formats, options.flag("flatten", flatten), backend,
            options.check_max_grad_norm(max_grad_norm), options.flag("skip_nonfinite", skip_nonfinite),
            options.flag("decoupled_lr", decoupled_lr), options.flag("unscale_in_step", unscale_in_step),
        )  # fmt: skip
        self._mask = mask
        self._reset()
        super().__init__(params, {**defaults, "differentiable": False})
        options.check_mask(mask, self.param_groups)
        for device in {p.device for p in self._params() if p.device.type != "meta"}:
            select(backend, device)
        if flatten:
            self._flat.hold(p for p in self._params() if self._settings.can_be_flat(p))
        self.skipped = torch.zeros((), dtype=torch.int64, device="cpu") if skip_nonfinite else None

    def _reset(self) -> None:  # to what can be worked out again
        self._plan, self._flat, self._hyper = None, FlatLayout(), options.HyperparameterTable()
        self._captured = []
        self._replaced: list[Any] = []  # in a capture

    @property
    def _step_supports_amp_scaling(self) -> bool:  # what torch.amp.GradScaler asks for
        return self._settings.unscale_in_step

    @property
    def seed(self) -> int:
        """Of ``stochastic_rounding``, in [0, 2^32). Saved. 0 unless set, so that replicas round alike."""
        return int(options.common_of(self.param_groups)["seed"])

    @seed.setter
    def seed(self, seed: int) -> None:
        seed = options.whole_number("seed", seed, 2**32)
        for group in self.param_groups:
            group["seed"] = seed

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as :meth:`torch.optim.Optimizer.add_param_group`; errors are the constructor's, and
        nothing is added then."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        group = {**self.defaults, **param_group}
        options.complete_group(group, self.param_groups, self._settings.by_name)
        earlier = len(self._params())
        self._settings.check_new(group, self.param_groups)
        super().add_param_group(group)
        try:
            added = self.param_groups[-1]
            added["weight_decay_mask"] = options.mask_of(self._mask, added, earlier)
        except Exception:
            self.param_groups.pop()
            raise

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one optimization step, and return what ``closure`` returned, if there is one. What is wrong
        with a hyperparameter, parameter, gradient or state is a ValueError, TypeError or RuntimeError that
        names it, and nothing has changed then."""
        # A compiled train step has a graph break here. As decorators, torch.compiler.disable and no_grad take
        # 25 us each where the caches hold nothing of them. What runs torch's operations is under no_grad.
        if is_dynamo_compiling():
            return _step_at_graph_break(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        common = options.common_of(groups)
        count = common["count"]
        if count == 0 and not self.state and checkpoint.asks_for_states(groups):
            self.init_state()
            return loss
        has_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        capturing = has_gpu and torch.cuda.is_current_stream_capturing()
        if capturing:
            options.check_capture(groups)
            # What changes is replaced. The events of pinned memory that is freed in a capture belong to its
            # graph, and torch fails where it asks them later.
            batches = () if self._plan is None else self._plan.batches
            self._replaced += [self._plan, self._hyper.on_device, *(dict(b.on_device) for _, b in batches)]
        elif self._replaced:
            self._replaced = []
        self._hyper.read(groups, count)
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        given = (common["seed"], self._hyper.shape, scale is not None, found_inf is not None)
        # Forgotten until it is whole: an interrupted refresh leaves rows with addresses of before.
        plan, self._plan = self._plan, None
        if plan is None or not plan.refresh(groups, self.state, given, capturing):
            if capturing:
                raise RuntimeError(
                    "a step that a CUDA graph captures must be like the one before it: make one before with "
                    "these parameters, gradients, states, grad_scale and found_inf"
                )
            plan = None  # which may hold states of before
            plan = Plan(self, self._settings, given, self._flat, self.skipped)
        self._plan = plan
        versioned: list[Tensor] = []
        try:
            inputs = self._hyper.inputs(groups, plan.devices, scale, found_inf)
            for batch in plan.copied:
                batch.load_copies()
            if plan.clipping is not None:
                self.skipped = plan.clipping.skipped
                inputs, self.grad_norm = plan.clipping(inputs)
            versioned = plan.versioned
            for backend, batch in plan.live:
                try:
                    backend.step(batch, inputs[batch.key.device])
                finally:
                    if batch.has_copies:
                        finish(batch.store_copies)
        finally:
            # A backward pass through an older graph must notice, whatever interrupted the loop.
            increment_version(versioned)
            if capturing:
                # The graph uses these at each replay, and what parameters' memory is now. What it uploads has
                # its values only then.
                self._captured += [plan, self._hyper.on_device, *(b.on_device for _, b in plan.live)]
                self._captured += map(copy.copy, self.state.values())
                self._captured += [p.detach() for p in plan.versioned]
                self._hyper.on_device = {}
                for _, batch in plan.live:
                    batch.on_device = valid_now(batch.on_device)
        for group in groups:
            group["count"] = min(count + 1, MAX_COUNT)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers and tensors, as :meth:`torch.optim.Optimizer.state_dict`: a
        snapshot, in which every tensor is a copy. Groups have ``"count"``, the number of ``step()`` calls
        that schedules see, the ``"seed"`` of stochastic rounding and the ``"version"`` of what is saved.
        Callables are left out. What collectives and others' code cannot take is saved as bfloat16, with
        nothing lost: 8-bit moments as their values, the 16 bits of a ``remainder`` as they are."""
        return checkpoint.snapshot(super().state_dict(), self._settings)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, here or from another optimizer with the same state keys.

        Moments take this optimizer's format and layout, ``step`` becomes an integer, and nothing aliases
        ``state_dict``. What another optimizer did otherwise is warned of, and so is a step that a CUDA
        graph has captured: it must be captured again. A state that lacks a key or has another shape is a
        ValueError that names both, and nothing has changed then.
        """
        with checkpoint.loading(self, self._settings):
            super().load_state_dict(state_dict)
        options.warn_of_graphs(self._captured, "load_state_dict")

    def __getstate__(self) -> dict[str, Any]:
        options.check_picklable(self.param_groups, self._mask)
        return self._pickled()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:  # which can copy callables that pickle cannot save
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        twin.__setstate__(copy.deepcopy(self._pickled(), memo))
        return twin

    def _pickled(self) -> dict[str, Any]:
        own = {"_settings": self._settings, "_mask": self._mask, "skipped": self.skipped}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_settings" in state:
            self._reset()
        self._plan = None


_step_at_graph_break = torch.compiler.disable(FusedOptimizer.step)  # type: ignore[no-untyped-call]
