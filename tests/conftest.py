"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen
before Triton is imported."""

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from helpers import BACKENDS, EACH, RULES, Judge, Make, Rule


def _interpret_faster() -> None:
    """Triton's interpreter puts its functions into ``triton.language`` at each call of a device function,
    which takes half of its time. For ours it is enough that the launch of their kernel has done it."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError:
        return
    usual = InterpretedFunction.__call__

    def call(self: Any, *args: Any, **options: Any) -> Any:
        if self.fn.__module__.startswith("fused_optim"):
            return self.rewrite()(*args, **options)
        return usual(self, *args, **options)

    InterpretedFunction.__call__ = call


_interpret_faster()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=EACH, ids="-".join)
def rule_and_backend(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def rule(rule_and_backend: tuple[str, str]) -> Rule:
    return RULES[rule_and_backend[0]]


@pytest.fixture
def judge(rule: Rule) -> Judge:
    return Judge(rule)


@pytest.fixture
def make(rule_and_backend: tuple[str, str], rule: Rule) -> Make:
    """The constructor of each optimizer."""

    def construct(params: Any, **options: Any) -> Any:
        return rule.optimizer(params, **{"backend": rule_and_backend[1], **rule.options, **options})

    return construct


@pytest.fixture(params=[False, True], ids=["list", "flat"])
def flatten(request: pytest.FixtureRequest) -> bool:
    return request.param


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many examples were checked: what tests gave to ``record_property`` as a number."""
    totals: dict[str, int] = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, n in report.user_properties:
            totals[name] = totals.get(name, 0) + n
    for name, n in totals.items():
        terminalreporter.write_line(f"{n:,} {name}")
