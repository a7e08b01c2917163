"""A ConvNeXt of timm, in timm's training loop, for a latency budget: `python -m examples.timm_convnext`.

The loop is the one of timm's train.py without its data pipeline: optimizer factory, scheduler, moving average of the weights.
EvolveNet's are the policy, the evolver, `observe` and `step`; the moving average follows, since it is named in `copies`.

On 2026-11-27, commit 45111b4, seed 0, on one core (30 seconds of it) that other programs used too, so that the times are rough
ones, it printed

    25.2 → 9.7 ms a batch; 91.6% of the other digits right
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import evolvenet  # first: it mends PyPI's torchvision beside a CPU-only torch

# isort: split
import torch
from sklearn.datasets import load_digits
from timm.models.convnext import ConvNeXt
from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
from timm.scheduler.scheduler_factory import create_scheduler_v2
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits, as images `[3, 32, 32]`."""
    images, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
    return nn.functional.interpolate(small, size=32, mode="bilinear").expand(-1, 3, -1, -1), torch.from_numpy(labels)


def seconds(model: nn.Module, images: Tensor) -> float:
    """The fastest of ten forward passes."""

    def once() -> float:
        start = time.perf_counter()
        model(images)
        return time.perf_counter() - start

    with torch.no_grad():
        model.eval()
        return min(once() for _ in range(10))


def build(tiny: bool) -> Any:
    """A ConvNeXt for small images."""
    dims = (8, 16, 24, 32) if tiny else (24, 48, 96, 192)
    return ConvNeXt(depths=(1, 1, 2, 1), dims=dims, num_classes=10, patch_size=2)


def main(tiny: bool = False, share: float = 0.6, policy: evolvenet.Policy | None = None) -> tuple[nn.Module, nn.Module]:
    """Train, with fewer and fewer units.

    Args:
        tiny: a run of seconds.
        share: of the latency at the start, reached at 60 % of the run.
        policy: None for a budget of that latency.

    Returns:
        The model and its moving average.
    """
    torch.manual_seed(0)
    model, epochs, size = build(tiny), 3 if tiny else 10, 64
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=1)
    assert scheduler is not None
    average = ModelEmaV3(model, decay=0.99)
    images, labels = digits()
    last = 4 * size if tiny else len(images) - 297
    before = seconds(model, images[:size])
    policy = policy or evolvenet.Budget(latency=share * before, by=0.6)
    evolver = evolvenet.Evolver(model, optimizer, policy, images[:size], copies=[average.module])
    steps = 0
    for epoch in range(epochs):
        for rows in torch.randperm(last).split(size):
            evolver.observe(images[rows])
            loss = nn.functional.cross_entropy(model.train()(images[rows]), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(model, step=steps)
            steps += 1
            scheduler.step_update(num_updates=steps)
        scheduler.step(epoch + 1)
        if epoch + 1 < epochs:
            evolver.step(at=steps, progress=(epoch + 1) / epochs)
    with torch.no_grad():
        right = (average.module.eval()(images[last:]).argmax(1) == labels[last:]).float().mean()
    after = seconds(model, images[:size])
    print(f"{1e3 * before:.1f} → {1e3 * after:.1f} ms a batch; {right:.1%} of the other digits right")
    return model, average.module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--share", type=float, default=0.6)
    main(**vars(parser.parse_args()))
