"""Halve a trained GPT and go on training it: `python -m examples.halve_gpt`.

A character model of the standard library's source. It is trained, cut to half of its parameters with a few batches (the
layers that consume what has gone are refitted), and trained on with the same optimizer, whose state has followed.
"""

from __future__ import annotations

import argparse
import inspect
from typing import Any

import evolvenet  # first: it mends PyPI's torchvision beside a CPU-only torch

# isort: split
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

LENGTH = 64


def text() -> Tensor:
    """Characters of a module of the standard library, as numbers below 128."""
    return torch.tensor([min(ord(each), 127) for each in inspect.getsource(argparse)])


def batch(characters: Tensor, rows: int) -> dict[str, Tensor]:
    """Pieces from random places, predicted one character ahead."""
    starts = torch.randint(0, len(characters) - LENGTH, (rows, 1))
    pieces = characters[starts + torch.arange(LENGTH)]
    return {"input_ids": pieces, "labels": pieces}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, characters: Tensor, steps: int) -> float:
    """Some steps; the mean loss of the last tenth of them."""
    losses: list[float] = []
    for _ in range(steps):
        loss = model.train()(**batch(characters, 16)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def main(tiny: bool = False) -> tuple[Any, list[float]]:
    """Train, halve, train.

    Args:
        tiny: a run of seconds.

    Returns:
        The model, and its loss before the cut, right after it, and after training on.
    """
    torch.manual_seed(0)
    size, layers, steps = (32, 1, 10) if tiny else (128, 3, 600)
    config = GPT2Config(vocab_size=128, n_positions=LENGTH, n_embd=size, n_layer=layers, n_head=4)
    model: Any = GPT2LMHeadModel(config)
    optimizer, characters = torch.optim.AdamW(model.parameters(), lr=1e-3), text()
    losses = [train(model, optimizer, characters, steps)]

    model.eval()
    batches = [batch(characters, 8) for _ in range(2 if tiny else 16)]
    graph = evolvenet.trace(model, batches[0])
    whole = graph.parameters
    sizes = evolvenet.allocate(model, graph, parameters=whole // 2, batches=batches)
    graph = evolvenet.prune(model, graph, sizes, batches=batches, optimizers=[optimizer])
    with torch.no_grad():
        losses.append(sum(float(model(**each).loss) for each in batches) / len(batches))

    losses.append(train(model, optimizer, characters, steps // 2))
    print(f"{whole:,} → {graph.parameters:,} parameters; loss {', '.join(f'{each:.3f}' for each in losses)}")
    return model, losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    main(**vars(parser.parse_args()))
