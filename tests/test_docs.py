"""The examples of the README and of the docstrings run as they are written; docs/formats.md
counts bytes right."""

import doctest
import re
from pathlib import Path

import pytest
import torch
from recipes import WITH_TORCH_ALONE, run

from bench import report
from fused_optim import AdamW, adabelief, adamaxw, adamw, surgery
from fused_optim.backends import BACKENDS
from fused_optim.state import state_parts
from fused_optim.storage import formats_of

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_readme_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(BACKENDS, "triton")  # its interpreter, which is chosen here, takes a minute
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)  # noqa: S102 (our own README)
    assert names["loss"].item() < 50  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", [adabelief, adamaxw, adamw, surgery])
def test_docstring_examples(module: object) -> None:
    failed, tried = doctest.testmod(module)  # type: ignore[arg-type]
    assert tried > 0 and failed == 0


def test_readme_figures_are_those_measured() -> None:
    text = README.read_text()
    assert report.updated(text) == text


def test_each_row_of_the_recipes_names_a_test() -> None:
    commands = re.findall(r"`pytest (\S+)(?: -k (\w+))?`", (ROOT / "docs/recipes.md").read_text())
    assert len(commands) >= 40
    for path, word in commands:
        tests = re.findall(r"^def (\w+)", (ROOT / path).read_text(), re.MULTILINE)
        assert any(word in test for test in tests), (path, word)


@pytest.mark.parametrize("recipe", WITH_TORCH_ALONE)
def test_recipe(recipe: str) -> None:
    """Runs as it is written; tests/stacks/test_recipes.py runs the trainers'."""
    model = torch.nn.Linear(3, 4)
    optimizer = AdamW(model.parameters(), state_format="8bit")
    names = {"model": model, "optimizer": optimizer, "group": optimizer.param_groups[0], "i": 0}
    scaler, rows = torch.amp.GradScaler("cpu"), torch.tensor([0, 2])
    loss = model(torch.ones(2, 3)).sum()
    run(recipe, scaler=scaler, loss=loss, old=model.weight, rows=rows, **names)
    stepped = recipe == "GradScaler"
    shape, step = ((4, 3), 1) if stepped else ((2, 3), 0)
    first = optimizer.param_groups[0]["params"][0]
    assert optimizer.decoded_state(first)["exp_avg"].shape == first.shape == shape
    assert int(optimizer.state[first]["step"]) == step


def test_the_bytes_of_formats_are_those_of_their_tensors() -> None:
    table = (ROOT / "docs/formats.md").read_text().split("<!-- bytes -->")[1].split("<!-- /bytes -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    assert len(rows) >= 8
    for dtype_name, arguments, kept, moved, _ in rows:
        dtype = getattr(torch, dtype_name)
        defaults = {"state_format": "fp32", "master_weights": None, "stochastic_rounding": False}
        formats = formats_of(dtype, **{**defaults, **eval(f"dict({arguments.strip('`')})")})
        parts = state_parts(("exp_avg", "exp_avg_var"), formats, dtype)
        state = sum(part.dtype.itemsize / part.block for part in parts)
        assert f"{2 * dtype.itemsize + state:.2f}" == kept, arguments
        assert f"{3 * dtype.itemsize + 2 * state:.2f}" == moved, arguments
