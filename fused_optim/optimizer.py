"""The ``torch.optim.Optimizer`` contract: groups, state, ``step()``, checkpoints. A subclass names its rule,
and a backend makes the step. A step goes: closure, hyperparameters, plan, launch."""

import copy
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, options
from .backends import Inputs, select, valid_now
from .flat import FlatLayout
from .layout import has_nonzero_gradient
from .plan import Plan, Settings, init_states
from .reference import MAX_COUNT
from .rules import RULES
from .state import bytes_in_use, check_saved, check_state, checked_step, decoded, in_formats, own
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
        unscale_in_step: have ``torch.amp.GradScaler`` hand its scale and whether it found an infinity to the
            step, which then unscales, or changes nothing, without a wait for the device and without a pass
            over the gradients. Off, the scaler unscales and skips itself, and gradients may be clipped
            between the two by code that does not know this optimizer (Lightning, say, refuses to clip for one
            that unscales). ``grad_scale`` and ``found_inf``, set as attributes by the caller, count either way.
        flatten: move parameters, gradients and states into contiguous buffers, with the same results; the
            tensors stay in them until :meth:`unflatten`, or until somebody replaces their data.
        backend: None for the best that the device has, or ``"triton"``, ``"cuda"``, ``"cpu"``, ``"eager"``.
        foreach, fused, capturable: taken, since factories pass them, and without effect: every step is fused,
            and one on a GPU can be captured.
        amsgrad, differentiable: must be False.
        max_grad_norm: clip all gradients together to this Euclidean norm, as
            ``torch.nn.utils.clip_grad_norm_`` does, after ``grad_scale`` and inside the step: gradients stay as
            they are. None does not clip; infinity works out :attr:`grad_norm` alone. DTensors on one mesh have
            one norm; what shards plain tensors (ZeroRedundancyOptimizer, DeepSpeed) must clip itself.
        skip_nonfinite: where that norm is infinite or NaN, change no parameter, state and step number, and
            count in :attr:`skipped`. Otherwise such a norm has the effect that it has in torch: gradients become
            0 or NaN.

    Attributes:
        grad_norm: of the last step's gradients, before they were clipped: a float64 tensor of no dimensions on
            the device of the first that has one. None before the first step, or where neither option asks for it.
        skipped: with ``skip_nonfinite`` the number of steps that were skipped since this optimizer was made, as
            an int64 tensor of no dimensions, after a step on the same device; else None.
    """

    rule: str  # the subclass's name in RULES
    _step_supports_amp_scaling = False  # what torch.amp.GradScaler asks for
    grad_norm: Tensor | None = None
    skipped: Tensor | None = None

    def __init__(
        self, params: Any, defaults: dict[str, Any], formats: tuple[str, str | None, bool],
        weight_decay_mask: options.WeightDecayMask | None, decoupled_lr: bool, max_grad_norm: float | None,
        skip_nonfinite: bool, unscale_in_step: bool, flatten: bool, backend: str | None, torchs: tuple[Any, ...],
    ) -> None:  # fmt: skip
        options.check_choices(*formats)
        options.check_torchs(dict(zip(options.TORCHS, torchs)))
        self._settings = Settings(
            RULES[self.rule], formats, options.flag("flatten", flatten), backend,
            options.check_max_grad_norm(max_grad_norm), options.flag("skip_nonfinite", skip_nonfinite),
        )  # fmt: skip
        self._decoupled_lr = options.flag("decoupled_lr", decoupled_lr)
        self._step_supports_amp_scaling = options.flag("unscale_in_step", unscale_in_step)
        self._mask = weight_decay_mask
        self._reset()
        super().__init__(params, {**defaults, "differentiable": False})
        options.check_mask(weight_decay_mask, self.param_groups)
        for device in {p.device for p in self._params() if p.device.type != "meta"}:
            select(backend, device)
        if flatten:
            self._flat.hold(p for p in self._params() if self._settings.can_be_flat(p))
        if skip_nonfinite:
            self.skipped = torch.zeros((), dtype=torch.int64, device="cpu")

    def _reset(self) -> None:  # to what can be worked out again
        self._plan: Plan | None = None
        self._flat = FlatLayout()
        self._hyper = options.HyperparameterTable()
        self._captured: list[Any] = []

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    # In the groups, the same in all of them, since all that saves optimizers saves groups.
    @property
    def _count(self) -> int:
        return int(self.param_groups[0].get("count", 0)) if self.param_groups else 0

    @property
    def seed(self) -> int:
        """Of ``stochastic_rounding``, in [0, 2^32). Saved. 0 unless set, so that replicas round alike."""
        return int(self.param_groups[0].get("seed", 0)) if self.param_groups else 0

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
        settings = {**self._settings.by_name, "decoupled_lr": self._decoupled_lr}
        settings["unscale_in_step"] = self._step_supports_amp_scaling
        options.complete_group(group, len(self.param_groups), self._count, self._decoupled_lr, settings)
        group["seed"] = self.seed
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
        if not self.state and self._is_asked_for_states():
            self.init_state()
            return loss
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if capturing:
            options.check_capture(self.param_groups)
        options.run_schedules(self.param_groups, self._count)
        self._hyper.read(self.param_groups)
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        given = (self.seed, scale is not None, found_inf is not None)
        # Forgotten until it is whole: an interrupted refresh leaves rows with addresses of before.
        plan, self._plan = self._plan, None
        if plan is None or not plan.refresh(self.param_groups, self.state, given):
            if capturing:
                raise RuntimeError(
                    "a step that a CUDA graph captures must be like the one before it: make one before with "
                    "these parameters, gradients, states, grad_scale and found_inf"
                )
            plan = Plan(self.param_groups, self.state, self._settings, given, self._flat, self.skipped)
        self._plan = plan
        inputs = {d: Inputs.on(d, self._hyper.on(d), scale, found_inf) for d in plan.devices}
        for _, batch in plan.batches:
            batch.load_copies()
        if plan.clipping is not None:
            self.skipped = plan.clipping.skipped
            inputs, self.grad_norm = plan.clipping(inputs)
        try:
            for backend, batch in plan.batches:
                try:
                    backend.step(batch, inputs[batch.key.device])
                finally:
                    finish(batch.store_copies)
        finally:
            # A backward pass through an older graph must notice, whatever interrupted the loop.
            torch.autograd.graph.increment_version(plan.versioned)
        if capturing:
            # The graph reads these at each replay.
            self._captured += [plan, self._hyper.on_device, *(batch.on_device for _, batch in plan.batches)]
            self._hyper.on_device = {}
            for _, batch in plan.batches:
                batch.on_device = valid_now(batch.on_device)
        count = min(self._count + 1, MAX_COUNT)
        for group in self.param_groups:
            group["count"] = count
        return loss

    def _is_asked_for_states(self) -> bool:
        """Whether this is no step but how ``torch.distributed.checkpoint`` asks for states that a checkpoint
        can be read into: no state yet, learning rates of 0, and all gradients there and zero."""
        if not all(options.lr_value(group["lr"]) == 0 for group in self.param_groups):
            return False
        params = [p for p in self._params() if p.requires_grad]
        return all(p.grad is not None for p in params) and not any(map(has_nonzero_gradient, params))

    @torch.no_grad()
    def init_state(self) -> None:
        """Make the states of all parameters that have none and require a gradient, as the first step would:
        no parameter changes, no step is counted. A checkpoint can be read into them.

        Example:
            >>> from fused_optim import AdamW
            >>> model = torch.nn.Linear(3, 1)
            >>> optimizer = AdamW(model.parameters())
            >>> optimizer.init_state()
            >>> sorted(optimizer.state[model.weight])
            ['exp_avg', 'exp_avg_sq', 'step']
        """
        init_states(self.param_groups, self.state, self._settings)

    def unflatten(self) -> None:
        """Give every parameter, gradient and state memory of its own, for code that frees or shares single
        parameters (``share_memory_()``), and so that a parameter that is kept keeps no more than itself."""
        for p in self._params():
            p.data, p.grad = own(p), own(p.grad)
            state = self.state.get(p, {})
            state.update({key: own(value) for key, value in state.items() if key != "step"})
        self._settings = replace(self._settings, flatten=False)
        self._plan, self._flat = None, FlatLayout()
        self._warn_of_graphs("unflatten")

    def decoded_state(self, param: Tensor) -> dict[str, Tensor]:
        """The state of a parameter as values, whatever its format: the moments and, with
        ``master_weights``, the float32 ``master``, in the parameter's shape and working precision (float32, or
        float64 for float64), and ``step``. All are copies. Of a parameter that was never stepped they are
        what its first step starts from. A parameter that no group holds is a ValueError, a state that does
        not fit the parameter's shape a RuntimeError."""
        name, settings = self._name_of(param), self._settings
        keys, state = settings.rule.states, self.state.get(param, {})
        check_state(name, param, state, keys, RuntimeError)
        split = settings.formats_of(param).param.aux is not None
        return decoded(state, param, keys, split, settings.dense_like(param))

    def set_decoded_state(self, param: Tensor, state: dict[str, Any]) -> None:
        """Give a parameter a state like that of :meth:`decoded_state`, in place of the one that it has.

        Values are rounded to the nearest in this optimizer's formats; those that :meth:`decoded_state` gave come
        out of it again as they were. The parameter is left as it is, and its master becomes the
        nearest that rounds to it; a ``master`` that is missing is what the parameter holds, one that
        is not needed is ignored. A state that lacks a key, has others, or another shape than the
        parameter's is a ValueError that names it, and nothing has changed then.

        Example: keep some rows of a weight, in a parameter that replaces it.
            >>> from fused_optim import AdamW
            >>> old = torch.nn.Parameter(torch.ones(4, 3))
            >>> optimizer = AdamW([old], state_format="8bit")
            >>> rows = torch.tensor([0, 2, 3])
            >>> state, new = optimizer.decoded_state(old), torch.nn.Parameter(old.detach()[rows])
            >>> optimizer.param_groups[0]["params"][0] = new; _ = optimizer.state.pop(old, None)
            >>> optimizer.set_decoded_state(new, {k: t[rows] if t.dim() else t for k, t in state.items()})
        """
        name, settings = self._name_of(param), self._settings
        keys = settings.rule.states
        for key in sorted(state.keys() - {*keys, "step", "master"}):
            raise ValueError(f"the state of parameter {name} must have {[*keys, 'step']}, got {key!r} too")
        check_saved(name, param, state, keys, settings.rule.name)
        step = checked_step(name, state["step"], ValueError)
        copies = {key: own(t) for key, t in state.items()}
        made = in_formats(copies, param, keys, settings.formats_of(param), settings.dense_like(param))
        self.state[param] = {**made, "step": torch.tensor(step, dtype=torch.int64, device=param.device)}
        self._warn_of_graphs("set_decoded_state")

    def _name_of(self, param: Tensor) -> str:  # for error texts
        for name, p, _ in options.numbered(self.param_groups):
            if p is param:
                return name
        raise ValueError(f"the parameter of shape {tuple(param.shape)} is in no group of this optimizer")

    def _warn_of_graphs(self, what: str) -> None:
        if self._captured:
            warnings.warn(
                f"a CUDA graph has captured a step of this optimizer, and {what} made new tensors for it: "
                "replays go on with the old ones; make a step, and capture it again",
                RuntimeWarning,
                stacklevel=3,
            )

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
        old = self.param_groups
        loaded: list[checkpoint.Loaded] = []

        def check(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            loaded.append(checkpoint.read(saved, old, self._settings, self._decoupled_lr))
            return {**saved, "param_groups": loaded[0][0], "state": {}}

        def install(_: torch.optim.Optimizer) -> None:
            checkpoint.keep_schedules(old, self.param_groups)
            self.state.update(loaded[0][1])

        # torch's own method casts moments to the parameter's dtype and cannot be told not to.
        with ExitStack() as hooks:
            hooks.callback(self.register_load_state_dict_pre_hook(check).remove)
            hooks.callback(self.register_load_state_dict_post_hook(install, prepend=True).remove)
            super().load_state_dict(state_dict)
        self._warn_of_graphs("load_state_dict")

    def __getstate__(self) -> dict[str, Any]:
        options.check_picklable(self.param_groups, self._mask)
        return self._pickled()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:  # which can copy callables that pickle cannot save
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        twin.__setstate__(copy.deepcopy(self._pickled(), memo))
        return twin

    def _pickled(self) -> dict[str, Any]:
        own = ("_settings", "_decoupled_lr", "_mask", "_step_supports_amp_scaling", "skipped")
        return {**super().__getstate__(), **{key: getattr(self, key) for key in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_settings" in state:
            self._reset()
        self._plan = None
