"""Networks of chemistry that packages ship with their weights, for `experiments.compare.shipped`, and inputs made here."""

from __future__ import annotations

import importlib
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from experiments.compare.shipped_networks import PARTS, Subject, module, neighbours, outputs, shipped


class Fingerprint(nn.Module):
    """The first token's output of a BERT."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[reactions, tokens]` → `[reactions, width]`."""
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]


GROUPS = (
    "C",
    "CC",
    "CCC",
    "C(C)C",
    "c1ccccc1",
    "c1ccc(F)cc1",
    "c1ccc(OC)cc1",
    "c1ccncc1",
    "CC1CC1",
    "c1ccc(Cl)cc1",
    "CCOC",
)
"""Groups of atoms that the reactions below are put together from, as SMILES."""

REACTIONS = (
    "OC(=O){a}.N{b}>>O=C({a})N{b}",
    "OC(=O){a}.O{b}>>O=C({a})O{b}",
    "Br{a}.OB(O){b}>>{a}{b}",
    "O=C{a}.N{b}>>C({a})N{b}",
    "Cl{a}.N{b}>>{a}N{b}",
    "Br{a}.O{b}>>{a}O{b}",
    "O=S(=O)(Cl){a}.N{b}>>O=S(=O)({a})N{b}",
    "O=C(OC){a}.N{b}>>O=C({a})N{b}",
    "O=C=N{a}.N{b}>>O=C(N{a})N{b}",
    "C#C{a}.I{b}>>C({a})#C{b}",
)
PATTERN = re.compile(
    r"(\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9])"
)


def rxnfp(_: Path) -> Subject:
    """The BERT of reaction fingerprints."""
    folder = shipped("rxnfp", "models", "transformers", "bert_ft")
    library: Any = importlib.import_module("transformers")
    model = Fingerprint(library.BertModel.from_pretrained(folder)).eval()
    vocabulary = {word: place for place, word in enumerate((folder / "vocab.txt").read_text("utf-8").split())}
    texts = [form.format(a=a, b=b) for form in REACTIONS for a, b in itertools.product(GROUPS, GROUPS) if a != b]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()

    def batch(places: Sequence[int]) -> dict[str, Tensor]:
        rows = [["[CLS]", *PATTERN.findall(texts[place]), "[SEP]"] for place in places]
        ids = torch.zeros(len(rows), 48, dtype=torch.long)
        for row, words in enumerate(rows):
            ids[row, : len(words)] = torch.tensor([vocabulary.get(word, vocabulary["[UNK]"]) for word in words[:48]])
        return {"input_ids": ids, "attention_mask": ids.ne(0).long()}

    inputs, known = batch(order[:200]), order[200:1096]
    before = neighbours(outputs(model, inputs, 50))

    def score(network: nn.Module) -> float:
        return float(neighbours(outputs(network, inputs, 50)).eq(before).double().mean())

    task = "same nearest neighbour as the uncut network's, 200 reactions made here"
    return Subject(
        model,
        [batch(known[place::PARTS]) for place in range(PARTS)],
        score,
        task,
        {"steps": 150, "rate": 3e-4, "batch_size": 32},
        16,
    )


# Crystals

CATIONS = {
    3: 0.76,
    11: 1.02,
    19: 1.38,
    12: 0.72,
    20: 1.0,
    38: 1.18,
    56: 1.35,
    25: 0.83,
    26: 0.78,
    28: 0.69,
    22: 0.61,
    40: 0.72,
}
ANIONS = {8: 1.40, 16: 1.84, 9: 1.33, 17: 1.81, 7: 1.46, 34: 1.98}
"""Atomic number: radius in ångström (Shannon 1976)."""

FCC = ((0.0, 0.5, 0.5), (0.5, 0.0, 0.5), (0.5, 0.5, 0.0))
CUBE = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
PROTOTYPES = (
    (FCC, ((0.0, 0.0, 0.0), (0.5, 0.5, 0.5)), 2.0),
    (FCC, ((0.0, 0.0, 0.0), (0.25, 0.25, 0.25)), 2.2),
    (CUBE, ((0.0, 0.0, 0.0), (0.5, 0.5, 0.5)), 1.155),
)
"""Rock salt, zinc blende and caesium chloride: lattice, places of the two atoms, lattice constant over the sum of the radii."""


@dataclass(frozen=True, eq=False)
class Crystal:
    """As much of pymatgen's `Structure` as CHGNet's converter uses.

    Args:
        numbers: atomic numbers.
        frac_coords: places of the atoms in the lattice, `[atoms, 3]`.
        matrix: the lattice, ångström, `[3, 3]`.
    """

    numbers: tuple[int, ...]
    frac_coords: Any
    matrix: Any

    @property
    def sites(self) -> list[Any]:
        """The atoms."""
        return [SimpleNamespace(specie=SimpleNamespace(Z=number)) for number in self.numbers]

    @property
    def lattice(self) -> Any:
        """The lattice."""
        return SimpleNamespace(matrix=self.matrix)

    @property
    def composition(self) -> Any:
        """A name."""
        return SimpleNamespace(formula=str(self.numbers))

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.sites)

    def get_neighbor_list(self, r: float, **_: Any) -> tuple[Any, Any, Any, Any]:
        """Pairs of atoms that are at most `r` apart: first, second, the second's cell, distance."""
        images = torch.cartesian_prod(*[torch.arange(-4, 5)] * 3).double()
        places = torch.as_tensor(self.frac_coords)
        apart = places[None, :, None] + images - places[:, None, None]
        far = (apart @ torch.as_tensor(self.matrix)).norm(dim=-1)
        one, two, cell = ((far > 1e-8) & (far < r)).nonzero(as_tuple=True)
        return one.numpy(), two.numpy(), images[cell].numpy(), far[one, two, cell].numpy()


def crystals(count: int, seed: int) -> list[Crystal]:
    """Of two elements in one of three prototypes, strained and displaced."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        cation, anion = (
            list(table.items())[int(torch.randint(len(table), (1,), generator=draw))] for table in (CATIONS, ANIONS)
        )
        lattice, places, scale = PROTOTYPES[int(torch.randint(len(PROTOTYPES), (1,), generator=draw))]
        strain = torch.eye(3).double() * (1 + 0.05 * torch.randn(1, generator=draw)) + 0.02 * torch.randn(
            3, 3, generator=draw
        )
        matrix = scale * (cation[1] + anion[1]) * torch.tensor(lattice).double() @ strain
        moved = torch.tensor(places).double() + 0.02 * torch.randn(2, 3, generator=draw)
        found.append(Crystal((cation[0], anion[0]), moved.numpy(), matrix.numpy()))
    return found


def chgnet(_: Path) -> Subject:
    """The CHGNet of energies of crystals."""
    # Of no use to the network itself; they import pymatgen and ase.
    for unused in ("chgnet.model.dynamics", "chgnet.utils.vasp_utils", "pymatgen", "pymatgen.core"):
        sys.modules.setdefault(unused, MagicMock(name=unused))
    model = module("chgnet.model.model").CHGNet.load(use_device="cpu", verbose=False).eval()

    def graphs(count: int, seed: int) -> list[Any]:
        return [model.graph_converter(crystal) for crystal in crystals(count, seed)]

    judged = graphs(64, 1)

    @torch.no_grad()
    def energies(network: nn.Module) -> Tensor:
        return (network(judged)["e"] - model.composition_model(judged)).double()

    before = energies(model)

    def score(network: nn.Module) -> float:
        return max(0.0, float(1 - (energies(network) - before).square().mean() / before.var(correction=0)))

    known = graphs(256, 0)
    size = len(known) // PARTS
    batches = [{"graphs": known[start : start + size]} for start in range(0, len(known), size)]
    task = (
        "share of the variance of energies, less the elements' own, that is as the uncut network's, crystals made here"
    )
    # A batch of graphs cannot be cut: it counts as one input of a trial.
    return Subject(model, batches, score, task, {"steps": 60}, 2)
