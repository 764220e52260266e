"""Who is measured: fused_optim in all its forms, and what people use today.

A provider is a name, the algorithm that it is held to, and a function that makes it for
groups of parameters. To measure one of your own against them, put a list ``PROVIDERS`` of
:class:`Provider` into a file and give its path as ``--extra``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from .formats import FORMATS, Format
from .references import HYPER

Groups = list[list[Tensor]]
"""Parameters with gradients, by parameter group."""


class Stepper(Protocol):
    """An optimizer that has been made for some parameters."""

    def step(self) -> Any: ...

    def zero_grad(self) -> None:
        """As a user would, with the optimizer's own method."""

    def params(self) -> list[Tensor]:
        """The parameters as they are now, on any device."""

    def state_bytes(self) -> int:
        """Bytes of all that the optimizer keeps for its parameters."""


@dataclass(frozen=True)
class Provider:
    """One way to make a step.

    Attributes:
        name: what tables call it.
        algorithm: the function of ``bench.references`` that it must agree with.
        make: a :class:`Stepper` for groups of parameters.
        packages: modules that must be there.
        devices: where it runs.
        dtypes: parameters that it takes.
        error: the largest root mean square error of its update, relative to the update.
        most_tensors: with more it would take minutes to compile.
        slow_start: it compiles for a good part of a minute before its first step.
        follows_gradients: it uses ``p.grad`` as it is at each step.
        wall_clock: on a GPU, torch's events do not see its stream.
        rule, backend, format, layout: of fused_optim's own.
    """

    name: str
    algorithm: str
    make: Callable[[Groups], Stepper]
    packages: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    error: float = 1e-4
    most_tensors: int | None = None
    slow_start: bool = False
    follows_gradients: bool = True
    wall_clock: bool = False
    rule: str = ""
    backend: str = ""
    format: str = ""
    layout: str = ""

    @property
    def ours(self) -> bool:
        return bool(self.rule)

    def why_not(self, device: str, dtype: str) -> str | None:
        """Why it cannot step parameters here; None if it can. Imports nothing."""
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
        if device not in self.devices:
            return f"it is for {' and '.join(self.devices)} only"
        if dtype not in self.dtypes:
            return f"it takes {' and '.join(self.dtypes)} only"
        return None

    def tolerance(self, dtype: str) -> float:
        """bfloat16 keeps 8 bits of a parameter, and some peers compute in it too."""
        return max(self.error, {"float32": 0.0, "bfloat16": 0.15, "float16": 0.03}[dtype])


class TorchStepper:
    """Any ``torch.optim.Optimizer``."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.step = optimizer.step
        self.zero_grad = optimizer.zero_grad

    def params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def state_bytes(self) -> int:
        return sum(_bytes(value) for state in self.optimizer.state.values() for value in state.values())

    def set_count(self, count: int) -> None:
        """What number the last step had, for those that keep it with each parameter."""
        for state in self.optimizer.state.values():
            step = state.get("step")
            if isinstance(step, Tensor):
                step.fill_(count)
            elif step is not None:
                state["step"] = count


def _bytes(value: Any) -> int:
    """Of tensors in nested containers; of a tensor subclass, of what it is made of. Step counters
    and other single numbers are not counted."""
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    if not isinstance(value, Tensor):
        return 0
    if type(value) is not Tensor and hasattr(value, "__tensor_flatten__"):
        return sum(_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.numel() * value.element_size() if value.numel() > 1 else 0


def _groups(groups: Groups) -> list[dict[str, Any]]:
    return [{"params": group} for group in groups]


_BETAS = (HYPER.beta1, HYPER.beta2)
_COMMON: dict[str, Any] = {"lr": HYPER.lr, "betas": _BETAS, "eps": HYPER.eps}
_DECAYED: dict[str, Any] = {**_COMMON, "weight_decay": HYPER.weight_decay}


# fused_optim

OUR_RULES = {"adabelief": "AdaBelief", "adamaxw": "AdamaxW"}
# Triton's interpreter, where it is chosen, runs on the CPU: to rehearse, not to be timed.
_TRITON = ("cpu", "cuda") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
OUR_BACKENDS = {"triton": _TRITON, "cuda": ("cuda",), "cpu": ("cpu",), "eager": ("cpu", "cuda")}
LAYOUTS = {"list": False, "flat": True, "static": "static"}
"""``flatten``, by the layout that it makes."""


class OurStepper(TorchStepper):
    """fused_optim's own."""

    def set_count(self, count: int) -> None:
        super().set_count(count)
        # Known to be equal, as after a checkpoint was loaded (which would take a copy of all states):
        # else no two flat parameters would share a row.
        optimizer: Any = self.optimizer
        optimizer._drop_plan()
        optimizer._know_steps({state["step"]: (count, None) for state in optimizer.state.values()})


def make_ours(rule: str, groups: Groups, format: Format, layout: str, backend: str) -> TorchStepper:
    """A fused_optim optimizer."""
    import fused_optim

    options = {**_DECAYED, **format.arguments, "flatten": LAYOUTS[layout], "backend": backend}
    if rule == "adabelief":
        options["eps_root"] = HYPER.eps
    return OurStepper(getattr(fused_optim, OUR_RULES[rule])(_groups(groups), **options))


@dataclass(frozen=True)
class OurProvider(Provider):
    """fused_optim's own: held to its eager backend, bit for bit."""

    def why_not(self, device: str, dtype: str) -> str | None:
        import fused_optim
        from fused_optim.backends import BACKENDS

        return (
            super().why_not(device, dtype)
            or FORMATS[self.format].why_not(getattr(fused_optim, OUR_RULES[self.rule]), dtype)
            or BACKENDS[self.backend].why_not(torch.device(device))
        )


def _ours() -> Iterator[Provider]:
    for rule, title in OUR_RULES.items():
        for backend, devices in OUR_BACKENDS.items():
            for format in FORMATS.values():
                for layout in LAYOUTS:
                    if backend == "eager" and layout != "list":
                        continue
                    if layout == "static" and format.name != "fp32":
                        continue  # like flat, but for the host

                    def make(
                        groups: Groups,
                        rule: str = rule,
                        format: Format = format,
                        layout: str = layout,
                        backend: str = backend,
                    ) -> Stepper:
                        return make_ours(rule, groups, format, layout, backend)

                    yield OurProvider(
                        f"fused_optim {title} {backend} {format.name} {layout}",
                        rule,
                        make,
                        devices=devices,
                        dtypes=("float32", "bfloat16", "float16"),
                        rule=rule,
                        backend=backend,
                        format=format.name,
                        layout=layout,
                        follows_gradients=layout != "static",
                    )


# torch


def _torch_adamw(**options: Any) -> Callable[[Groups], Stepper]:
    return lambda groups: TorchStepper(torch.optim.AdamW(_groups(groups), **_DECAYED, **options))


def _torch_adamax(groups: Groups) -> Stepper:
    return TorchStepper(torch.optim.Adamax(_groups(groups), **_COMMON, foreach=True))


class _PlainAdaBelief(torch.optim.Optimizer):
    """AdaBelief as one writes it with PyTorch's operators, for ``torch.compile``."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, dict(_DECAYED))
        self.t = torch.zeros((), dtype=torch.float64)
        self.compiled = torch.compile(_plain_adabelief, fullgraph=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"]]
        for p in params:
            if not self.state[p]:
                state = {"m": torch.zeros_like(p, dtype=torch.float32)}
                self.state[p] = state | {"s": torch.zeros_like(p, dtype=torch.float32)}
        # A tensor: a number would be compiled in, anew at each step.
        self.t += 1
        moments = [[self.state[p][key] for p in params] for key in ("m", "s")]
        self.compiled(params, [p.grad for p in params], *moments, self.t)


def _plain_adabelief(
    params: list[Tensor], grads: list[Tensor], ms: list[Tensor], ss: list[Tensor], t: Tensor
) -> None:
    c1, c2 = 1 - HYPER.beta1**t, 1 - HYPER.beta2**t
    for p, grad, m, s in zip(params, grads, ms, ss):
        g = grad.float()
        m.copy_((1 - HYPER.beta1) * g + HYPER.beta1 * m)
        s.copy_((1 - HYPER.beta2) * (g - m).square() + HYPER.beta2 * s + HYPER.eps)
        update = (m / c1) / ((s / c2).sqrt() + HYPER.eps) + HYPER.weight_decay * p
        p.copy_(p - HYPER.lr * update)


# Other packages


def _adabelief_pytorch(groups: Groups) -> Stepper:
    from adabelief_pytorch import AdaBelief

    options = {**_DECAYED, "weight_decouple": True, "rectify": False, "print_change_log": False}
    with redirect_stdout(StringIO()):
        return TorchStepper(AdaBelief(_groups(groups), **options))


def _pytorch_optimizer(groups: Groups) -> Stepper:
    from pytorch_optimizer import AdaBelief

    return TorchStepper(AdaBelief(_groups(groups), **_DECAYED, weight_decouple=True, rectify=False))


def _timm(groups: Groups) -> Stepper:
    # timm's models want a torchvision built with this torch; its optimizers do not. Packages
    # that stand for the real ones let them be imported alone.
    if "timm" not in sys.modules:
        spec = importlib.util.find_spec("timm")
        assert spec is not None and spec.origin is not None
        for name, folder in (("timm", ""), ("timm.optim", "optim")):
            package = ModuleType(name)
            package.__spec__ = importlib.util.spec_from_loader(name, None)
            package.__path__ = [str(Path(spec.origin).parent / folder)]
            sys.modules[name] = package
    from timm.optim.adabelief import AdaBelief

    return TorchStepper(AdaBelief(_groups(groups), **_DECAYED, decoupled_decay=True, rectify=False))


def _optimi(groups: Groups) -> Stepper:
    import optimi

    return TorchStepper(optimi.AdamW(_groups(groups), **_DECAYED))


def _flashoptim(groups: Groups) -> Stepper:
    from flashoptim import FlashAdamW

    return TorchStepper(FlashAdamW(_groups(groups), **_DECAYED))


def _bitsandbytes(groups: Groups) -> Stepper:
    from bitsandbytes.optim import AdamW8bit

    return TorchStepper(AdamW8bit(_groups(groups), **_DECAYED))


def _torchao(groups: Groups) -> Stepper:
    from torchao.optim import AdamW8bit

    return TorchStepper(AdamW8bit(_groups(groups), **_DECAYED))


def _deepspeed(groups: Groups) -> Stepper:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return TorchStepper(DeepSpeedCPUAdam(_groups(groups), **_DECAYED, adamw_mode=True))


def _apex(groups: Groups) -> Stepper:
    from apex.optimizers import FusedAdam

    return TorchStepper(FusedAdam(_groups(groups), **_DECAYED, adam_w_mode=True))


def _transformer_engine(groups: Groups) -> Stepper:
    from transformer_engine.pytorch.optimizers import FusedAdam

    return TorchStepper(FusedAdam(_groups(groups), **_DECAYED, adam_w_mode=True))


class OptaxStepper:
    """An Optax chain in one jitted call that may overwrite its inputs, on torch's device."""

    def __init__(self, groups: Groups, scale: Callable[[Any], Any]) -> None:
        # JAX would take three quarters of a GPU for itself.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax
        import optax

        self.jax = jax
        chain = optax.chain(
            scale(optax),
            optax.add_decayed_weights(HYPER.weight_decay),
            optax.scale_by_learning_rate(HYPER.lr),
        )
        params = [p for group in groups for p in group]
        self.values = [self._array(p) for p in params]
        self.gradients = [self._array(p.grad) for p in params if p.grad is not None]
        self.sources = params
        self.state = chain.init(self.values)

        def step(params: Any, gradients: Any, state: Any) -> tuple[Any, Any]:
            updates, state = chain.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        self.jitted = jax.jit(step, donate_argnums=(0, 2))

    def _array(self, t: Tensor) -> Any:
        array = self.jax.numpy.asarray(t.detach().float().cpu().numpy())
        return array.astype(str(t.dtype).removeprefix("torch."))

    def new_gradients(self) -> None:
        """Take over the parameters' gradients."""
        self.gradients = [self._array(p.grad) for p in self.sources if p.grad is not None]

    def step(self) -> None:
        self.values, self.state = self.jitted(self.values, self.gradients, self.state)
        self.jax.block_until_ready((self.values, self.state))

    def zero_grad(self) -> None:
        pass

    def params(self) -> list[Tensor]:
        numpy = self.jax.numpy
        return [
            torch.tensor(self.jax.device_get(v.astype(numpy.float32))).to(p.dtype)
            for v, p in zip(self.values, self.sources)
        ]

    def state_bytes(self) -> int:
        leaves = self.jax.tree_util.tree_leaves(self.state)
        return sum(leaf.nbytes for leaf in leaves if leaf.size > 1)


def _optax_adabelief(groups: Groups) -> Stepper:
    return OptaxStepper(
        groups,
        lambda optax: optax.scale_by_belief(HYPER.beta1, HYPER.beta2, HYPER.eps, HYPER.eps),
    )


def _optax_adamaxw(groups: Groups) -> Stepper:
    return OptaxStepper(groups, lambda optax: optax.scale_by_adamax(HYPER.beta1, HYPER.beta2, HYPER.eps))


_OPTAX: dict[str, Any] = {
    "packages": ("jax", "optax"),
    "most_tensors": 200,
    "follows_gradients": False,
    "wall_clock": True,
}
_8BIT = 0.15

PEERS = (
    Provider("torch AdamW fused", "adamw", _torch_adamw(fused=True)),
    Provider("torch AdamW foreach", "adamw", _torch_adamw(foreach=True)),
    Provider("torch Adamax foreach", "adamax", _torch_adamax),
    Provider(
        "torch.compile AdaBelief",
        "adabelief",
        lambda groups: TorchStepper(_PlainAdaBelief(_groups(groups))),
        most_tensors=20,
        slow_start=True,
    ),
    Provider("adabelief-pytorch", "adabelief", _adabelief_pytorch, ("adabelief_pytorch",)),
    Provider("pytorch_optimizer AdaBelief", "adabelief", _pytorch_optimizer, ("pytorch_optimizer",)),
    Provider("timm AdaBelief", "adabelief", _timm, ("timm",)),
    Provider("torch-optimi AdamW", "adamw", _optimi, ("optimi",)),
    Provider("flashoptim AdamW", "adamw", _flashoptim, ("flashoptim",), devices=("cuda",), error=_8BIT),
    Provider("bitsandbytes AdamW8bit", "adamw", _bitsandbytes, ("bitsandbytes",), error=_8BIT),
    Provider(
        "torchao AdamW8bit", "adamw", _torchao, ("torchao",), most_tensors=20, slow_start=True, error=_8BIT
    ),
    Provider("Optax adabelief jit", "adabelief", _optax_adabelief, **_OPTAX),
    Provider("Optax adamaxw jit", "adamaxw", _optax_adamaxw, **_OPTAX),
    Provider("DeepSpeedCPUAdam", "adamw", _deepspeed, ("deepspeed",), devices=("cpu",), slow_start=True),
    Provider("apex FusedAdam", "adamw", _apex, ("apex",), devices=("cuda",)),
    Provider(
        "TransformerEngine FusedAdam",
        "adamw",
        _transformer_engine,
        ("transformer_engine",),
        devices=("cuda",),
    ),
)


def providers(extra: Path | None = None) -> dict[str, Provider]:
    """All, by name; ``extra`` is a file with a list ``PROVIDERS`` of more."""
    known: Sequence[Provider] = [*_ours(), *PEERS]
    if extra is not None:
        known = [*known, *_module(extra).PROVIDERS]
    return {provider.name: provider for provider in known}


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
