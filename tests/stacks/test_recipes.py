"""The code of docs/recipes.md runs as it is written. See recipes.py for what runs elsewhere."""

from pathlib import Path

import pytest
import timm
from recipes import OF_PROCESSES, RECIPES, WITH_TORCH_ALONE, run
from test_huggingface import gpt2, rows

pytestmark = [pytest.mark.stacks, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in WITH_TORCH_ALONE + OF_PROCESSES])
def test_recipe(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = [{"input_ids": row, "labels": row} for row in rows()]
    names = run(recipe, model=timm.create_model("resnet10t") if recipe == "timm" else gpt2(), dataset=dataset)
    trainer = names.get("trainer")
    optimizer = names.get("optimizer") or getattr(trainer, "optimizer", None) or trainer.optimizers[0]
    trained = recipe not in ("timm", "LoRA with peft")
    assert len({int(state["step"]) for state in optimizer.state.values()}) == trained
    assert len(optimizer.param_groups) > 1 or trained
