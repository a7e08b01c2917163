"""Layers that leave a list are counted in every configuration that counts them, and come back with their count."""

from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import pytest
from torch import nn
from transformers import BartConfig, BartModel, T5Config, T5Model

from evolvenet.surgery.module_replacement import exchange_modules
from evolvenet.surgery.remaining_layers import RemainingLayers

PAIRS: dict[str, Any] = {"vocab_size": 20, "d_model": 8}


def t5() -> Any:
    return T5Model(T5Config(**PAIRS, d_kv=4, d_ff=8, num_heads=2, num_layers=3, num_decoder_layers=3))


def bart() -> Any:
    heads: dict[str, Any] = {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    return BartModel(
        BartConfig(**PAIRS, **heads, encoder_layers=3, decoder_layers=3, encoder_ffn_dim=8, decoder_ffn_dim=8)
    )


@pytest.mark.parametrize(
    ("make", "part", "fields"),
    [
        (t5, "encoder.block", ("num_layers", "num_decoder_layers")),
        (t5, "decoder.block", ("num_decoder_layers", "num_layers")),
        (bart, "encoder.layers", ("encoder_layers", "decoder_layers")),
        (bart, "decoder.layers", ("decoder_layers", "encoder_layers")),
    ],
)
def test_the_model_is_built_shorter_by_its_own_configuration(make: Any, part: str, fields: tuple[str, str]) -> None:
    model = make()
    layers = model.get_submodule(part)
    before = {id(each.config): dict(vars(each.config)) for each in model.modules() if hasattr(each, "config")}
    with ExitStack() as undo:
        exchange_modules(model, {layers: RemainingLayers.without(layers, [1])}, undo)
        assert [getattr(model.config, name) for name in fields] == [2, 3]
        built = type(model)(model.config)
        assert len(built.get_submodule(part)) == 2
        assert {name: each.shape for name, each in built.state_dict().items()} == {
            name: each.shape for name, each in model.state_dict().items()
        }
        with ExitStack() as back:
            exchange_modules(model, {model.get_submodule(part): layers}, back)
            assert [getattr(model.config, name) for name in fields] == [3, 3]
            back.pop_all()
    after = {id(each.config): dict(vars(each.config)) for each in model.modules() if hasattr(each, "config")}
    assert after == before


def test_one_number_for_the_layers_of_two_parts_stays() -> None:
    config = T5Config(**PAIRS, d_kv=4, d_ff=8, num_heads=2, num_layers=3, num_decoder_layers=3)
    model = nn.Module()
    model.config = config  # type: ignore[assignment]
    model.one, model.two = (T5Model(deepcopy(config)).encoder for _ in range(2))
    layers = model.get_submodule("one.block")
    with ExitStack() as undo:
        exchange_modules(model, {layers: RemainingLayers.without(layers, [1])}, undo)  # type: ignore[arg-type]
        counts = [each.config.num_layers for each in (model, model.one, model.two)]  # type: ignore[union-attr]
    assert counts == [3, 2, 3]
