"""Halve a trained GPT and go on training it: `python -m examples.halve_gpt`.

A character model of the standard library's source. It is trained, cut to half of its parameters with a few batches (the
layers that consume what has gone are refitted), and trained on with the same optimizer, whose state has followed.

On 2026-11-27, commit 45111b4, seed 0, on one core (48 seconds of it), it printed

    619,648 → 309,706 parameters; loss 1.776, 1.781, 1.561
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


def train(model: nn.Module, optimizer: torch.optim.Optimizer, characters: Tensor, steps: int) -> None:
    """Some steps."""
    for _ in range(steps):
        loss = model.train()(**batch(characters, 16)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def loss_on(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """The mean loss in eval mode."""
    return sum(float(model.eval()(**each).loss) for each in batches) / len(batches)


def main(tiny: bool = False) -> tuple[Any, list[float]]:
    """Train, halve, train.

    Args:
        tiny: a run of seconds.

    Returns:
        The model, and its loss on the text's last tenth, which it is not trained on: before the cut, right after it, and after
        training on.
    """
    torch.manual_seed(0)
    size, layers, steps = (32, 1, 10) if tiny else (128, 3, 300)
    config = GPT2Config(vocab_size=128, n_positions=LENGTH, n_embd=size, n_layer=layers, n_head=4)
    model: Any = GPT2LMHeadModel(config)
    optimizer, characters = torch.optim.AdamW(model.parameters(), lr=1e-3), text()
    seen, other = characters.tensor_split([len(characters) * 9 // 10])
    tests = [batch(other, 16) for _ in range(1 if tiny else 8)]
    train(model, optimizer, seen, steps)
    losses = [loss_on(model, tests)]

    batches = [batch(seen, 8) for _ in range(2 if tiny else 8)]
    graph = evolvenet.trace(model, batches[0])
    whole = graph.parameters
    sizes = evolvenet.allocate(model, graph, parameters=whole // 2, batches=batches)
    graph = evolvenet.prune(model, graph, sizes, batches=batches, optimizers=[optimizer])
    losses.append(loss_on(model, tests))

    train(model, optimizer, seen, steps // 2)
    losses.append(loss_on(model, tests))
    print(f"{whole:,} → {graph.parameters:,} parameters; loss {', '.join(f'{each:.3f}' for each in losses)}")
    return model, losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    main(**vars(parser.parse_args()))
