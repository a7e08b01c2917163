"""Networks of chemistry that packages ship with their weights, for `experiments.compare.shipped`, and inputs made here."""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.compare.shipped_networks import PARTS, Subject, neighbours, outputs, shipped


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

    inputs = batch(order[256:456])
    before = neighbours(outputs(model, inputs, 50))

    def score(network: nn.Module) -> float:
        return float(neighbours(outputs(network, inputs, 50)).eq(before).double().mean())

    task = "same nearest neighbour as the uncut network's, 200 reactions made here"
    return Subject(
        model,
        [batch(order[place:256:PARTS]) for place in range(PARTS)],
        score,
        task,
        {"steps": 50, "batch_size": 16},
        16,
    )
