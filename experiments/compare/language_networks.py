"""The text, the networks and their training of `experiments.compare.language`, the same for every method."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import sysconfig
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.compare.copies import copied, fingerprint
from experiments.pages import write_whole

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
"""Characters with a number of their own; all others share the last one."""

VOCABULARY = len(ALPHABET) + 1

SPAN = 4096
"""Characters in the pieces of the text that go to training, validation or test as a whole."""

WARM = 0.1
"""Share of the steps in which the learning rate rises; it then falls to 0 along a cosine."""


@dataclass(frozen=True)
class Setting:
    """How large everything is.

    Args:
        layers: blocks of a network.
        width: of the residual stream.
        heads: of an attention.
        context: characters in a sequence.
        batch: sequences in a training step.
        steps: of the training of an uncut network.
        rate: its largest learning rate.
        steps_after: training steps after a cut.
        rate_after: their largest learning rate.
        calibration: sequences of the training text that methods with data measure on.
        judged: most sequences of the validation and of the test text.
        seeds: of the networks.
    """

    layers: int = 4
    width: int = 128
    heads: int = 8
    context: int = 128
    batch: int = 32
    steps: int = 2000
    rate: float = 2e-3
    steps_after: int = 100
    rate_after: float = 5e-4
    calibration: int = 256
    judged: int = 512
    seeds: tuple[int, ...] = (0, 1, 2)


FULL = Setting()
SMALL = Setting(2, 64, 4, 64, steps=1000, judged=1024)
"""For what takes many runs, see `experiments.compare.time_to_accuracy`."""

TINY = Setting(2, 32, 4, 32, batch=8, steps=20, steps_after=3, calibration=32, judged=16, seeds=(0,))
"""For tests and trials."""


# The text


def gathered() -> str:
    """Python's documentation, as `help()` shows it, and the licences of Python and of what is installed; each paragraph once."""
    topics = importlib.import_module("pydoc_data.topics").topics
    parts = [topics[name] for name in sorted(topics)]
    places = [Path(sysconfig.get_path("stdlib")) / "LICENSE.txt", *licences()]
    parts += [path.read_text(encoding="utf-8", errors="replace") for path in places if path.is_file()]
    paragraphs = (paragraph.strip("\n") for part in parts for paragraph in part.split("\n\n"))
    # The same licence comes with many packages: test text must not be training text.
    return "\n\n".join(dict.fromkeys(paragraph for paragraph in paragraphs if paragraph.strip()))


def licences() -> list[Path]:
    """The licence files of the installed packages, by package and name."""
    found = {
        (distribution.metadata["Name"] or "", str(file)): Path(str(distribution.locate_file(file)))
        for distribution in importlib.metadata.distributions()
        for file in distribution.files or ()
        if file.name.upper().startswith(("LICEN", "COPYING"))
    }
    return [found[key] for key in sorted(found)]


@dataclass(frozen=True)
class Text:
    """The text as numbers, in three parts that share no paragraph.

    Args:
        train: `[characters]`.
        validation: by which settings are chosen.
        test: on which results are measured.
        fingerprint: of the text.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    fingerprint: str

    @classmethod
    def of(cls, text: str, device: str = "cpu") -> Text:
        """Of each twenty pieces the third goes to validation, the thirteenth to the test."""
        known = {character: number for number, character in enumerate(ALPHABET)}
        numbers = torch.tensor([known.get(character, len(known)) for character in text], device=device)
        parts: tuple[list[Tensor], ...] = ([], [], [])
        for place, piece in enumerate(numbers.split(SPAN)):
            parts[{2: 1, 12: 2}.get(place % 20, 0)].append(piece)
        train, validation, test = (torch.cat(each or parts[0]) for each in parts)
        return cls(train, validation, test, hashlib.sha256(text.encode()).hexdigest()[:12])

    @classmethod
    def read(cls, path: Path, device: str = "cpu") -> Text:
        """From a file, which is made of the text on this machine if it is not there."""
        if not path.exists():
            write_whole(path, gathered())
        return cls.of(path.read_text(encoding="utf-8"), device)


def windows(text: Tensor, length: int, most: int) -> Tensor:
    """Sequences of `length` + 1 characters, evenly from the whole text, `[most or fewer, length + 1]`.

    >>> windows(torch.arange(10), 2, 2).tolist()
    [[0, 1, 2], [6, 7, 8]]
    """
    places = torch.arange(0, len(text) - length, length + 1)
    chosen = places[torch.linspace(0, len(places) - 1, min(most, len(places))).round().long()].to(text.device)
    return text[chosen[:, None] + torch.arange(length + 1, device=text.device)]


def drawn(text: Tensor, length: int, count: int, generator: torch.Generator) -> Tensor:
    """Sequences from random places, `[count, length + 1]`."""
    starts = torch.randint(len(text) - length, (count, 1), generator=generator).to(text.device)
    return text[starts + torch.arange(length + 1, device=text.device)]


# The networks


def build(kind: str, setting: Setting) -> nn.Module:
    """A network of the transformers library with random weights: "llama" (grouped-query attention) or "gpt2"."""
    library: Any = importlib.import_module("transformers")
    common = {
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "use_cache": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if kind == "llama":
        config = library.LlamaConfig(
            hidden_size=setting.width,
            num_hidden_layers=setting.layers,
            num_attention_heads=setting.heads,
            num_key_value_heads=setting.heads // 2,
            intermediate_size=3 * setting.width,
            max_position_embeddings=setting.context,
            **common,
        )
        return library.LlamaForCausalLM(config)
    config = library.GPT2Config(
        n_embd=setting.width,
        n_layer=setting.layers,
        n_head=setting.heads,
        n_positions=setting.context,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **common,
    )
    return library.GPT2LMHeadModel(config)


KINDS = {"llama": "LLaMA", "gpt2": "GPT-2"}


def loss_of(model: nn.Module, sequences: Tensor) -> Tensor:
    """Mean cross-entropy of the next character, in nats."""
    logits = model(input_ids=sequences[:, :-1]).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), sequences[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: nn.Module, sequences: Tensor) -> float:
    """`loss_of` many sequences, in eval mode."""
    model.eval()
    parts = sequences.split(64)
    return sum(float(loss_of(model, part)) * len(part) for part in parts) / len(sequences)


def fit(model: nn.Module, text: Text, setting: Setting, seed: int, steps: int, rate: float) -> None:
    """Train with AdamW; the sequences depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=WARM)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, drawn(text.train, setting.context, setting.batch, generator)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@dataclass(frozen=True)
class Uncut:
    """A trained network and what it is measured on.

    Args:
        kind: "llama" or "gpt2".
        seed: of its weights and its training.
        model: the network, in eval mode.
        text: its text.
        setting: how large everything is.
        record: parameters, losses on validation and test text, "weights", a fingerprint.
    """

    kind: str
    seed: int
    model: nn.Module
    text: Text
    setting: Setting
    record: dict[str, Any]

    @classmethod
    def of(cls, kind: str, seed: int, text: Text, setting: Setting, folder: Path, device: str) -> Uncut:
        """Read from the folder if it is there, else trained and saved there."""
        weights, record = folder / "uncut.pt", folder / "uncut.json"
        torch.manual_seed(seed)
        model = build(kind, setting)
        if record.exists():
            model.load_state_dict(torch.load(weights, weights_only=True))
            return cls(
                kind, seed, model.to(device).eval(), text, setting, json.loads(record.read_text(encoding="utf-8"))
            )
        model.to(device)
        begin = time.perf_counter()
        fit(model, text, setting, seed, setting.steps, setting.rate)
        seconds = time.perf_counter() - begin
        found = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "validation": mean_loss(model, windows(text.validation, setting.context, setting.judged)),
            "test": mean_loss(model, windows(text.test, setting.context, setting.judged)),
            "seconds": round(seconds, 1),
            "steps": setting.steps,
            "device": device,
            "text": text.fingerprint,
            "characters": len(text.train) + len(text.validation) + len(text.test),
            "weights": fingerprint(copied(model).cpu()),
        }
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, weights)
        write_whole(record, json.dumps(found, indent=1))
        return cls(kind, seed, model, text, setting, found)

    @property
    def example(self) -> dict[str, Tensor]:
        """For the trace."""
        return {"input_ids": self.calibration()[0]["input_ids"][:2]}

    def calibration(self) -> list[dict[str, Tensor]]:
        """Sequences of the training text in batches of 32, the same for all methods."""
        generator = torch.Generator().manual_seed(1000 + self.seed)
        chosen = drawn(self.text.train, self.setting.context, self.setting.calibration, generator)
        return [{"input_ids": part[:, :-1].contiguous()} for part in chosen.split(32)]


def add_sizes(parser: argparse.ArgumentParser, kinds: Iterable[str], seeds: Sequence[int] | None = None) -> None:
    """Add the options that select networks."""
    parser.add_argument("--only", nargs="+", choices=tuple(kinds), default=tuple(kinds), help="networks")
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds, help="of the networks (default: 0 1 2)")
