"""Lightning's Trainer and Fabric."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from helpers import assert_same_bits
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision as FabricPrecision
from lightning.pytorch.plugins.precision import MixedPrecision
from recorder import Recorder

from fused_optim import AdaBelief, AdamW

pytestmark = [pytest.mark.stacks, pytest.mark.filterwarnings("default")]
BATCHES = torch.randn(12, 4, 8, generator=torch.Generator().manual_seed(1))


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


class Regression(lightning.LightningModule):  # type: ignore[misc]
    """Automatic optimization gives ``step()`` a closure. The loss of step ``overflow`` is infinite."""

    def __init__(self, flatten: bool, overflow: int = -1) -> None:
        super().__init__()
        self.model, self.flatten, self.overflow = network(), flatten, overflow

    def training_step(self, batch: Any, index: int) -> Any:
        step = self.trainer.global_step  # by which a resumed run sees what the whole one did
        return self.model(BATCHES[step]).square().mean() * (torch.inf if step == self.overflow else 1)

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), lr=0.01, weight_decay=0.1, flatten=self.flatten)
        self.recorder = Recorder(optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fp16() -> Any:  # which the precision flag refuses on a CPU, and torch has
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))


def fit(folder: Path, module: Any, steps: int, checkpoint: Any = None, **options: Any) -> Any:
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(BATCHES, batch_size=None), ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize(
    "clipping", [{}, {"gradient_clip_val": 0.01}, {"accumulate_grad_batches": 2}], ids=str
)
def test_lightning(precision: str, clipping: dict[str, Any], flatten: bool, tmp_path: Path) -> None:
    """Closures, clipping and accumulation; in one go, and on from a checkpoint: the same, and eager's."""

    def options() -> dict[str, Any]:
        return clipping | ({"plugins": [fp16()]} if precision == "16-mixed" else {"precision": precision})

    whole, half, rest = Regression(flatten), Regression(flatten), Regression(flatten)
    fit(tmp_path, whole, 6, **options())
    whole.recorder.check(steps=6)
    if "gradient_clip_val" in clipping:
        norms = [torch.stack([g.norm() for g in grads]).norm() for grads, _ in whole.recorder.steps]
        assert all(0 < norm <= 0.0101 for norm in norms)
    fit(tmp_path, half, 3, **options()).save_checkpoint(tmp_path / "half.ckpt")
    fit(tmp_path, rest, 6, tmp_path / "half.ckpt", **options())
    assert_same_bits(list(rest.parameters()), list(whole.parameters()))


def test_lightning_skips_a_step(flatten: bool, tmp_path: Path) -> None:
    """Gradients that overflowed change nothing, and the scale is lowered."""
    module = Regression(flatten, overflow=2)
    trainer = fit(tmp_path, module, 6, plugins=[fp16()])
    assert trainer.precision_plugin.scaler.get_scale() == 32.0
    optimizer = trainer.optimizers[0]
    assert {int(s["step"]) for s in optimizer.state.values()} == {5}
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_fabric(precision: str, flatten: bool, tmp_path: Path) -> None:
    """Clipping; what was saved in the middle goes on to the same end."""
    options: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        options = {"plugins": [FabricPrecision("16-mixed", "cpu", scaler)]}
    fabric = Fabric(accelerator="cpu", devices=1, **options)

    def prepared() -> tuple[Any, ...]:
        model = network()
        optimizer = AdaBelief(model.parameters(), lr=0.01, flatten=flatten)
        return optimizer, *fabric.setup(model, optimizer)

    def train(model: Any, optimizer: Any, batches: Any) -> None:
        for batch in batches:
            optimizer.zero_grad()
            fabric.backward(model(batch).square().mean())
            fabric.clip_gradients(model, optimizer, max_norm=0.1)
            optimizer.step()

    plain, model, optimizer = prepared()
    recorder = Recorder(plain)
    train(model, optimizer, BATCHES[:3])
    fabric.save(tmp_path / "half.ckpt", {"model": model, "optimizer": optimizer})
    train(model, optimizer, BATCHES[3:6])
    recorder.check(steps=6)
    _, again, optimizer = prepared()
    fabric.load(tmp_path / "half.ckpt", {"model": again, "optimizer": optimizer})
    train(again, optimizer, BATCHES[3:6])
    assert_same_bits(list(again.parameters()), list(model.parameters()))
