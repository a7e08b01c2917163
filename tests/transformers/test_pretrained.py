"""What `save_pretrained` writes `from_pretrained` brings back bit for bit; with equal layers, transformers alone does."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import evolvenet
from evolvenet import WidthGraph
from evolvenet.errors import RecordError
from evolvenet.surgery.width_record import record_of
from evolvenet.transformers import from_pretrained, save_pretrained
from tests.helpers.transformers_families import DECODERS, FAMILIES, family, generated, inputs_of, logits

QUICK = ("llama", "gpt2", "bert", "vit")
"""Tracing is what takes long; the others are tried by `make test-all`."""


def families(*names: str) -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in names]


@cache
def graph_of(name: str) -> WidthGraph:
    return evolvenet.trace(family(name), inputs_of(name, 1))


def cut(name: str, *, equal: bool = False) -> Any:
    """A model of which every width is cut, each to another share; or the inner widths alone, all alike."""
    model, graph = family(name), graph_of(name)
    sizes = {
        width.name: max(width.smallest, width.step, (width.size - 1 - place % 3) // width.step * width.step)
        for place, width in enumerate(graph.resizable)
        if width.size > 4 or name not in DECODERS
    }
    if equal:
        sizes = {width.name: 24 for width in graph.resizable if width.size == 40}
    evolvenet.prune(model, graph, sizes)
    return model


def plain(folder: Path) -> Any:
    """The model that the transformers library loads by itself."""
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, kind).from_pretrained(folder)


@pytest.mark.parametrize("name", families(*FAMILIES))
def test_a_model_with_other_widths_in_every_layer_comes_back(name: str, tmp_path: Path) -> None:
    model = cut(name)
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert torch.equal(logits(again, name), logits(model, name))
    if name in DECODERS:
        assert torch.equal(generated(again, name), generated(model, name))
    known, own = record_of(again), record_of(model)
    assert known is not None
    assert own is not None
    assert known.graph_of(again) == own.graph_of(model)


def test_the_weights_are_parts_of_the_mapped_files(tmp_path: Path) -> None:
    """A large network opens without a second copy of it in memory, also with other widths and in parts."""
    save_pretrained(cut("llama"), tmp_path, max_shard_size="20KB")
    again = from_pretrained(tmp_path)
    lines = [line for line in Path("/proc/self/maps").read_text("utf-8").splitlines() if str(tmp_path) in line]
    assert len(lines) > 1
    parts = [range(*(int(end, 16) for end in line.split()[0].split("-"))) for line in lines]
    assert all(any(p.data_ptr() in part for part in parts) for p in again.parameters())


@pytest.mark.parametrize("name", families(*(name for name in FAMILIES if name != "mixtral")))
def test_with_equal_layers_the_transformers_library_alone_loads_it(name: str, tmp_path: Path) -> None:
    model = cut(name, equal=True)
    assert save_pretrained(model, tmp_path)
    again = plain(tmp_path)
    assert torch.allclose(logits(again, name), logits(model, name), rtol=1e-5, atol=1e-5)
    if name in DECODERS:
        assert torch.equal(generated(again, name), generated(model, name))
    assert torch.equal(logits(from_pretrained(tmp_path), name), logits(model, name))


@pytest.mark.parametrize("name", families("bert", "llama tied", "mixtral"))
def test_in_parts_tied_weights_lie_once_and_nothing_is_pickled(name: str, tmp_path: Path) -> None:
    model = cut(name)
    save_pretrained(model, tmp_path, max_shard_size="20KB")
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 2
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    names = [name for part in parts for name in load_file(part)]
    assert len(names) == len(set(names))
    again = from_pretrained(tmp_path)
    assert torch.equal(logits(again, name), logits(model, name))
    tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert tied is (name != "mixtral")
    loaded = evolvenet.load(family(name, seed=1), tmp_path) if tied else again
    assert torch.equal(logits(loaded, name), logits(model, name))


def test_a_head_that_is_gone_is_one_less_in_the_configuration_and_not_smaller_ones(tmp_path: Path) -> None:
    """Half of the heads have the shapes of heads of half the size, whose outputs are others."""
    model, graph = family("llama"), graph_of("llama")
    evolvenet.prune(model, graph, {width.name: 1 for width in graph.resizable if width.size == 2})
    assert save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 8)
    assert torch.equal(logits(plain(tmp_path), "llama"), logits(model, "llama"))


def test_sizes_that_are_allocated_with_equal_layers_stand_in_the_configuration(tmp_path: Path) -> None:
    model, graph = family("llama"), graph_of("llama")
    sizes = evolvenet.allocate(model, graph, int(0.6 * graph.parameters), uniform="layers", multiple=4)
    evolvenet.prune(model, graph, sizes)
    assert save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["intermediate_size"] < 40
    assert config["intermediate_size"] % 4 == 0
    assert torch.allclose(logits(plain(tmp_path), "llama"), logits(model, "llama"), rtol=1e-5, atol=1e-5)


def test_a_number_that_the_configuration_does_not_take_is_no_way_to_say_a_width(tmp_path: Path) -> None:
    """The inner units of DINOv2 are a whole multiple of its features; before release 5 of the library any multiple."""
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=16, patch_size=8
    )
    model: Any = transformers.Dinov2Model(config).eval()
    images = {"pixel_values": torch.randn(1, 3, 16, 16)}
    graph = evolvenet.trace(model, images)
    inner = [width.name for width in graph.resizable if width.size == 64]
    graph = evolvenet.prune(model, graph, dict.fromkeys(inner, 40))
    assert save_pretrained(model, tmp_path / "between") is transformers.__version__.startswith("4.")
    assert torch.equal(from_pretrained(tmp_path / "between")(**images)[0], model(**images)[0])
    evolvenet.prune(model, graph, dict.fromkeys(inner, 32))
    assert save_pretrained(model, tmp_path / "whole")
    assert torch.allclose(plain(tmp_path / "whole")(**images)[0], model(**images)[0], atol=1e-5)


def test_half_precision_and_a_dtype_of_the_load(tmp_path: Path) -> None:
    model = cut("llama").bfloat16()
    save_pretrained(model, tmp_path)
    assert torch.equal(logits(from_pretrained(tmp_path), "llama"), logits(model, "llama"))
    assert from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_a_model_that_was_not_changed_is_saved_as_ever(tmp_path: Path) -> None:
    model = family("bert")
    assert save_pretrained(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    assert torch.equal(logits(from_pretrained(tmp_path / "ours"), "bert"), logits(model, "bert"))


def test_a_folder_is_written_again_without_the_widths_that_stood_there(tmp_path: Path) -> None:
    save_pretrained(cut("bert"), tmp_path)
    save_pretrained(family("bert"), tmp_path)
    assert torch.equal(logits(from_pretrained(tmp_path), "bert"), logits(family("bert"), "bert"))


def test_a_copy_needs_example_inputs_unless_its_configuration_says_it_all(tmp_path: Path) -> None:
    model = copy.deepcopy(cut("bert"))
    with pytest.raises(RecordError, match="example_inputs"):
        save_pretrained(model, tmp_path)
    save_pretrained(model, tmp_path, example_inputs=inputs_of("bert"))
    assert torch.equal(logits(from_pretrained(tmp_path), "bert"), logits(model, "bert"))
    assert save_pretrained(copy.deepcopy(cut("bert", equal=True)), tmp_path)
    assert torch.equal(logits(from_pretrained(tmp_path), "bert"), logits(cut("bert", equal=True), "bert"))


def test_other_folders_are_refused_with_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a folder that save_pretrained wrote, got nothing there"):
        from_pretrained(tmp_path / "none")
    with pytest.raises(RecordError, match=r"with a config\.json, got an empty folder"):
        from_pretrained(tmp_path)
    save_pretrained(cut("bert"), tmp_path)
    family("bert").save_pretrained(tmp_path)  # over the record of other widths
    with pytest.raises(RecordError, match="of other shapes"):
        from_pretrained(tmp_path)
    (tmp_path / "evolvenet.json").write_text("{}")
    with pytest.raises(RecordError, match=r"evolvenet\.json cannot be read"):
        from_pretrained(tmp_path)
    (tmp_path / "evolvenet.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RecordError, match="cannot be read"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(RecordError, match="model_class"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("name", families("bert", "vit", "mixtral"))
def test_what_the_transformers_library_saved_after_a_cut_is_traced_to_know_its_widths(
    name: str, tmp_path: Path
) -> None:
    """Of ViT and Mixtral it names the tensors otherwise than the model does."""
    model = cut(name)
    model.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert torch.equal(logits(evolvenet.load(family(name), path), name), logits(model, name))
    again = from_pretrained(tmp_path)
    assert torch.equal(logits(again, name), logits(model, name))
    own = record_of(again)
    assert own is not None
    assert own.graph_of(again) is not None


def test_a_folder_without_a_record_may_have_widths_that_only_outputs_beside_the_logits_fix(tmp_path: Path) -> None:
    """T5 returns the states of its encoder as well."""
    model = family("t5")
    graph = evolvenet.trace(model, inputs_of("t5", 1), outputs="logits")
    streams = {width.name: 24 for width in graph.resizable if width.size == 32}
    assert streams
    evolvenet.prune(model, graph, streams)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(from_pretrained(tmp_path), "t5"), logits(model, "t5"))


def test_more_than_widths_is_refused_without_a_record_too(tmp_path: Path) -> None:
    model = cut("bert")
    model.cls.predictions.decoder = torch.nn.Linear(model.cls.predictions.decoder.in_features, 30)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    with pytest.raises(RecordError, match=r"expected cls\.predictions\.\S+ of shape \(48,.*got \(30"):
        from_pretrained(tmp_path)


def test_a_tensor_that_is_missing_is_not_made_up(tmp_path: Path) -> None:
    save_pretrained(cut("bert"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("bert.encoder.layer.1.output.dense.bias")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecordError, match=r"without \['bert\.encoder\.layer\.1\.output\.dense\.bias'\]"):
        from_pretrained(tmp_path)


def test_only_models_of_the_transformers_library_are_saved_so(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="got a Linear"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path)


def test_a_family_that_initializes_by_the_configured_width_comes_back_with_another(tmp_path: Path) -> None:
    """Mamba copies its decays from a table of the configured width."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=20, hidden_size=32, num_hidden_layers=2, state_size=8)
    model, words = transformers.MambaForCausalLM(config).eval(), torch.randint(0, 20, (1, 8))
    graph = evolvenet.trace(model, {"input_ids": words})
    evolvenet.resize(model, graph, {"backbone.layers.0.mixer.in_proj": evolvenet.IndexMap.keep(range(63), size=64)})
    save_pretrained(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path)(words).logits, model(words).logits)


def test_a_given_state_dict_of_another_model_is_refused(tmp_path):
    model = cut("bert")
    other = family("bert").state_dict()
    with pytest.raises(RecordError, match=r"expected the tensors of the BertForMaskedLM, \S+ of shape .* and \d+ more"):
        save_pretrained(model, tmp_path / "folder", state_dict=other)
    assert not (tmp_path / "folder").exists()


def test_a_given_state_dict_that_lacks_tensors_is_refused(tmp_path):
    model = cut("bert")
    state = {name: each for name, each in model.state_dict().items() if "layer.1" not in name}
    with pytest.raises(RecordError, match="expected all tensors of the BertForMaskedLM, got none for"):
        save_pretrained(model, tmp_path / "folder", state_dict=state)
    assert not (tmp_path / "folder").exists()
