"""LoRA of one rank, AdaLoRA, and LoRA whose ranks evolve, at equal parameters: `python -m experiments.compare.adapters`.

A small BERT learns five of scikit-learn's digits, pixel by pixel; adapters then teach it the other five. AdaLoRA and the evolving
ranks begin at 6 and end at 4 on average, LoRA has 4 throughout. Writes `adapters.md` beside this file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evolvenet  # first: it mends PyPI's torchvision beside a CPU-only torch

# isort: split
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

PAGE = Path(__file__).with_suffix(".md")
LAYERS = ["query", "value", "intermediate.dense", "output.dense"]
FIRST, LAST = 6, 4
"""Ranks at the beginning and at the end."""
Data = tuple[Tensor, Tensor]


def digits(low: int) -> tuple[Data, Data]:
    """Training and test data of five digits: pixels of every other row as words, labels from 0."""
    pixels, labels = (torch.from_numpy(each).long() for each in load_digits(return_X_y=True))
    mine = (labels >= low) & (labels < low + 5)
    words = pixels[mine].reshape(-1, 8, 8)[:, ::2].reshape(-1, 32)
    labels = labels[mine] - low
    cut = 3 * len(words) // 4
    return (words[:cut], labels[:cut]), (words[cut:], labels[cut:])


def train(model: Any, optimizer: Any, data: Data, steps: int, after: Callable[[int, Tensor], object]) -> None:
    """`after` is called with the number of steps done and the batch, before gradients are cleared."""
    words, labels = data
    for step in range(1, steps + 1):
        rows = torch.randint(0, len(words), (32,))
        model.train()(input_ids=words[rows], labels=labels[rows]).loss.backward()
        optimizer.step()
        after(step, words[rows])
        optimizer.zero_grad()


def accuracy(model: Any, data: Data) -> float:
    """Percent."""
    with torch.no_grad():
        return 100 * float((model.eval()(input_ids=data[0]).logits.argmax(1) == data[1]).float().mean())


def adapted(kind: str, state: dict[str, Tensor], data: Data, steps: int) -> tuple[Any, list[int]]:
    """A model with adapters, trained, and their ranks at the end."""
    model: Any = base()
    model.load_state_dict(state)
    rank = LAST if kind == "LoRA" else FIRST
    common: dict[str, Any] = {"lora_alpha": 2 * rank, "target_modules": LAYERS, "modules_to_save": ["classifier"]}
    if kind == "AdaLoRA":
        options = {"init_r": FIRST, "target_r": LAST, "tinit": steps // 10, "tfinal": 2 * steps // 5, "deltaT": 10}
        model = get_peft_model(model, AdaLoraConfig(**options, total_step=steps, **common))
    else:
        model = get_peft_model(model, LoraConfig(r=rank, **common))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=3e-3)
    evolver: Any = None
    if kind == "evolving":
        trained = sum(each.numel() for name, each in model.named_parameters() if "lora_" in name)
        budget = sum(each.numel() for each in model.parameters()) - trained * (FIRST - LAST) // FIRST
        policy = evolvenet.Budget(params=budget, by=0.6, smallest=1)
        evolver = evolvenet.Evolver(model, optimizer, policy, {"input_ids": data[0][:2]})

    def after(step: int, words: Tensor) -> None:
        if kind == "AdaLoRA":
            model.base_model.update_and_allocate(step)
        elif evolver is not None:
            evolver.observe({"input_ids": words})
            if step % (steps // 12) == 0 and step < 0.8 * steps:
                evolver.step(at=step, progress=step / steps)

    train(model, optimizer, data, steps, after)
    if kind == "AdaLoRA":
        values = [each for name, each in model.named_parameters() if "lora_E" in name]
        return model, [int((each != 0).sum()) for each in values]
    return model, [module.lora_A["default"].out_features for module in model.modules() if hasattr(module, "lora_A")]


def base() -> Any:
    """The BERT."""
    config = BertConfig(
        vocab_size=17, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    config.num_labels = 5
    return BertForSequenceClassification(config)


def run(seed: int, steps: int) -> dict[str, tuple[float, list[int]]]:
    """{kind: (accuracy on the test data, ranks at the end)} of one seed."""
    torch.manual_seed(seed)
    model = base()
    train(model, torch.optim.AdamW(model.parameters(), lr=2e-3), digits(0)[0], steps, lambda *_: None)
    state, (data, test) = model.state_dict(), digits(5)
    found: dict[str, tuple[float, list[int]]] = {}
    for kind in ("LoRA", "AdaLoRA", "evolving"):
        torch.manual_seed(seed)
        trained, ranks = adapted(kind, state, data, steps)
        found[kind] = (accuracy(trained, test), ranks)
    return found


def _means(values: dict[str, list[float]]) -> str:
    means = ", ".join(f"{kind} {sum(each) / len(each):.1f}" for kind, each in values.items())
    return f"\n\nMeans: {means}. Where seeds differ by more than kinds, no kind is shown to be the better one.\n"


def main(seeds: int, steps: int, out: Path = PAGE) -> None:
    """Run all seeds and write the page."""
    rows: list[str] = []
    values: dict[str, list[float]] = {}
    for seed in range(seeds):
        for kind, (value, ranks) in run(seed, steps).items():
            values.setdefault(kind, []).append(value)
            rows.append(
                f"| {seed} | {kind} | {value:.1f} | {sum(ranks) / len(ranks):.2f} | {min(ranks)}–{max(ranks)} |"
            )
            print(rows[-1], flush=True)
    out.write_text(
        "# Adapters whose ranks evolve, beside LoRA and AdaLoRA\n\n"
        f"`python -m experiments.compare.adapters --seeds {seeds} --steps {steps}`: a BERT of two layers that knows the digits "
        f"0 to 4 learns 5 to 9 through adapters of rank {LAST} on average at the end (AdaLoRA and evolving ranks begin at "
        f"{FIRST}); accuracy on digits that were not trained on, in percent.\n\n"
        "| seed | adapters | accuracy | mean rank | ranks |\n| ---: | --- | ---: | ---: | --- |\n"
        + "\n".join(rows)
        + _means(values),
        encoding="utf-8",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    main(**vars(parser.parse_args()))
