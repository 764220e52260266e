"""States beside steps and state dicts: made early, taken out as values and put back, moved, counted."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import options
from .checkpoint import fitted
from .flat import FlatLayout
from .layout import local, placed_like
from .plan import Plan, Settings, init_states
from .state import bytes_in_use, check_state, decoded, own


class StateAccess(torch.optim.Optimizer):
    """What our optimizers have beside the contract of ``torch.optim``."""

    _settings: Settings
    _plan: Plan | None
    _flat: FlatLayout
    _hyper: options.HyperparameterTable
    _captured: list[Any]  # what CUDA graphs read at each replay

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

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
        options.warn_of_graphs(self._captured, "unflatten")

    def decoded_state(self, param: Tensor) -> dict[str, Tensor]:
        """The state of a parameter as values, whatever its format: the moments and, with
        ``master_weights``, the float32 ``master``, in the parameter's shape and working precision (float32,
        or float64 for float64), and ``step``. All are copies, placed like the parameter if that is a DTensor.
        Of a parameter that was never stepped they are what its first step starts from. A parameter that no
        group holds is a ValueError, a state that does not fit the parameter's shape a RuntimeError."""
        name, settings, here = options.name_of(param, self.param_groups), self._settings, local(param)
        keys, state = settings.rule.states, {k: local(t) for k, t in self.state.get(param, {}).items()}
        check_state(name, here, state, keys, RuntimeError)
        split = settings.formats_of(param).param.aux is not None
        values = decoded(state, here, keys, split, settings.dense_like(param))
        return {key: t if key == "step" else placed_like(param, t) for key, t in values.items()}

    def set_decoded_state(self, param: Tensor, state: dict[str, Any]) -> None:
        """Give a parameter a state like that of :meth:`decoded_state`, in place of the one that it has. That
        of a DTensor may be of DTensors or of whole tensors.

        Values are rounded to the nearest in this optimizer's formats; those that :meth:`decoded_state` gave
        come out of it again as they were. The parameter is left as it is, and its master becomes the nearest
        that rounds to it; a ``master`` that is missing is what the parameter holds, one that is not needed is
        ignored. A state that lacks a key, has others, or another shape than the parameter's is a ValueError
        that names it, and nothing has changed then.

        Example: keep some rows of a weight, in a parameter that replaces it.
            >>> from fused_optim import AdamW
            >>> old = torch.nn.Parameter(torch.ones(4, 3))
            >>> optimizer = AdamW([old], state_format="8bit")
            >>> rows = torch.tensor([0, 2, 3])
            >>> state, new = optimizer.decoded_state(old), torch.nn.Parameter(old.detach()[rows])
            >>> optimizer.param_groups[0]["params"][0] = new; _ = optimizer.state.pop(old, None)
            >>> optimizer.set_decoded_state(new, {k: t[rows] if t.dim() else t for k, t in state.items()})
        """
        name, known = options.name_of(param, self.param_groups), [*self._settings.rule.states, "step"]
        for key in sorted(state.keys() - {*known, "master"}):
            raise ValueError(f"the state of parameter {name} must have {known}, got {key!r} too")
        self.state[param] = fitted(name, param, state, self._settings)
        options.warn_of_graphs(self._captured, "set_decoded_state")

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
