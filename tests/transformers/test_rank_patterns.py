"""A configuration of PEFT says the rank of each layer, also where one layer's name is the end of another's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from torch import nn

from evolvenet.transformers.adapter_ranks import note_ranks
from evolvenet.transformers.rank_patterns import patterns_of


def pattern_key_of_014(patterns: Iterable[str], path: str) -> str:
    """As PEFT 0.14 looks for it; the installed release does as all since 0.15."""
    return next((pattern for pattern in patterns if re.match(rf".*\.{pattern}$", path)), path)


LOOKUPS = [pattern_key_of_014, get_pattern_key]
paths = st.lists(st.sampled_from(("fc", "a", "1", "a_1", "ac")), min_size=1, max_size=3).map(".".join)


@pytest.mark.parametrize("lookup", LOOKUPS)
@given(values=st.dictionaries(paths, st.integers(1, 4), min_size=1, max_size=6))
def test_every_release_finds_each_layers_own_number(lookup: Callable[[Any, str], str], values: dict[str, int]) -> None:
    patterns = patterns_of(values, default=3)
    assert {path: patterns.get(lookup(patterns.keys(), path), 3) for path in values} == values


class Nested(nn.Module):
    """Three layers, the name of each the end of the next one's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.a = nn.ModuleDict({"fc": nn.Linear(6, 6), "a": nn.ModuleDict({"fc": nn.Linear(6, 6)})})

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        first: Any = self.a
        return self.fc(inputs).relu() + first["fc"](inputs).relu() + first["a"]["fc"](inputs).relu()


def test_peft_alone_loads_changed_ranks_of_layers_with_like_names_whatever_patterns_stood_there(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    base = Nested()
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["fc"],
        rank_pattern={"fc": 3},
        alpha_pattern={"a.fc": 9},
        init_lora_weights=False,
    )
    model: Any = get_peft_model(base, config)
    ranks = {"fc": 2, "a.fc": 3, "a.a.fc": 4}
    for path, rank in ranks.items():
        layer = model.base_model.model.get_submodule(path)
        layer.lora_A["default"], layer.lora_B["default"] = (
            nn.Linear(6, rank, bias=False),
            nn.Linear(rank, 6, bias=False),
        )
    note_ranks(model)
    inputs = torch.randn(3, 6)
    expected = model(inputs)
    model.save_pretrained(tmp_path)
    plain, own = Nested(), base.state_dict()
    plain.load_state_dict({name.replace(".base_layer", ""): own[name] for name in own if "lora_" not in name})
    again: Any = PeftModel.from_pretrained(plain, str(tmp_path))
    assert torch.allclose(again(inputs), expected, atol=1e-6)
