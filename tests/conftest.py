"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen
before Triton is imported."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from helpers import BACKENDS, EACH, RULES, Make, Rule


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
def make(rule_and_backend: tuple[str, str], rule: Rule) -> Make:
    """The constructor of each optimizer."""

    def construct(params: Any, **options: Any) -> Any:
        return rule.optimizer(params, **{"backend": rule_and_backend[1], **rule.options, **options})

    return construct


@pytest.fixture(params=[False, True], ids=["list", "flat"])
def flatten(request: pytest.FixtureRequest) -> bool:
    return request.param
