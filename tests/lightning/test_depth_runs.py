"""Blocks that a run of Lightning removes stand in its checkpoints, from which it resumes bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evolvenet  # first: it mends PyPI's torchvision beside a CPU-only torch

# isort: split
import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    def __init__(self, place: int, numbered: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        if numbered:
            self.layer_idx = place

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


class Net(lightning.LightningModule):
    """The second block adds next to nothing."""

    def __init__(self, numbered: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(4, 6), nn.Linear(6, 2)
        self.blocks = nn.ModuleList(Block(place, numbered) for place in range(3))
        with torch.no_grad():
            for parameter in self.blocks[1].down.parameters():  # type: ignore[union-attr]
                parameter.mul_(1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self(batch[0]) - batch[0][:, :2]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def fit(folder: Path, numbered: bool, resume: Path | None = None) -> tuple[Any, Any]:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    evolution = evolvenet.WidthEvolution(policy=evolvenet.Threshold(depth=True, start=0.0), every_n_steps=3)
    trainer = lightning.Trainer(
        max_steps=12, accelerator="cpu", callbacks=[evolution, ModelCheckpoint(folder, every_n_train_steps=8, save_top_k=-1)],
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(net := Net(numbered), DataLoader(TensorDataset(x), batch_size=16), ckpt_path=resume, weights_only=None)
    return net, evolution.history


@pytest.mark.parametrize("numbered", [True, False])
def test_a_run_that_removed_a_block_resumes_bit_by_bit_and_its_checkpoint_is_loaded(
    numbered: bool, tmp_path: Path
) -> None:
    whole, history = fit(tmp_path, numbered)
    assert history.events[0].removed_blocks == ("blocks.1",)
    saved = next(tmp_path.glob("*step=8.ckpt"))
    again, resumed = fit(tmp_path / "again", numbered, saved)
    first, second = whole.state_dict(), again.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert [event.removed_blocks for event in resumed.events] == [event.removed_blocks for event in history.events]
    assert resumed.events[-1].sizes == history.events[-1].sizes
    loaded: Any = Net.load_from_checkpoint(next(tmp_path.glob("*step=8.ckpt")))
    assert sum(each.numel() for each in loaded.parameters()) < sum(each.numel() for each in Net(numbered).parameters())
    assert len(loaded.blocks) == (2 if numbered else 3)
