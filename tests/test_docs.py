"""The examples of the README and of the docstrings run as they are written."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from bench import readme
from fused_optim import adabelief, adamaxw

README = Path(__file__).parents[1] / "README.md"


def test_readme_example() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)  # noqa: S102 (our own README)
    assert names["loss"].item() < 50  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", [adabelief, adamaxw])
def test_docstring_examples(module: object) -> None:
    failed, tried = doctest.testmod(module)  # type: ignore[arg-type]
    assert tried > 0 and failed == 0


def test_readme_figures_are_those_measured() -> None:
    text = README.read_text()
    assert readme.updated(text) == text
