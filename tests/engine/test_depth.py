"""Residual blocks that carry nothing are removed whole: the function stays, optimizers forget them, checkpoints know it."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import evolvenet
from evolvenet.engine.depth import energy_limit, find_removals, remove_blocks
from evolvenet.measurement.residual_blocks import observe_blocks
from evolvenet.surgery.module_replacement import REPLACEMENT_KEY, exchange_modules, whole_in
from evolvenet.surgery.removed_block import PASSES, RemovedBlock


class Block(nn.Module):
    """Before each of two branches a norm, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.mix = nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 3)
        self.blocks = nn.Sequential(*[Block() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.blocks(self.enter(x)))


def net(scale: float = 0.0) -> Any:
    """The second block adds next to nothing, and the MLP of the third."""
    torch.manual_seed(0)
    model: Any = Net().double()
    with torch.no_grad():
        for layer in (model.blocks[1].mix, model.blocks[1].mlp[2], model.blocks[2].mlp[2]):
            for parameter in layer.parameters():
                parameter.mul_(scale)
    return model


X = torch.randn(32, 4, generator=torch.Generator().manual_seed(1)).double()


def test_what_adds_nothing_goes_and_the_function_stays() -> None:
    model = net()
    before, whole = model(X), len(list(model.parameters()))
    optimizer = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    model.load_state_dict(net().state_dict())
    assert remove_blocks(model, X, optimizers=optimizer) == {"blocks.1": 0.0, "blocks.2.mlp": 0.0}
    assert torch.equal(model(X), before)
    assert len(list(model.parameters())) == whole - 10 - 4
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    assert held == {id(each) for each in model.parameters()} == {id(each) for each in optimizer.state}
    graph = evolvenet.trace(model, X[:2])
    assert "blocks.0.mlp.0" in graph.sizes
    assert "blocks.2.mlp.0" not in graph.sizes
    loss = model(X).square().sum()
    loss.backward()
    optimizer.step()
    assert model(X).square().sum() < loss


def test_a_share_says_how_much_may_be_lost() -> None:
    model = net(scale=1e-3)
    before = model(X)
    assert remove_blocks(model, X) == {}
    removed = remove_blocks(model, X[:2], [X], share=1e-4)
    assert list(removed) == ["blocks.1", "blocks.2.mlp"]
    assert all(0 < lost < 1e-4 for lost in removed.values())
    assert 0 < torch.dist(model(X), before) < 1e-2 * before.norm()
    with pytest.raises(evolvenet.ResizeError, match=r"0 … 1, got 2"):
        remove_blocks(model, X, share=2)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_freshly_built_model_loads_it_with_widths_that_changed_before_and_after(ending: str, tmp_path: Path) -> None:
    model = net()
    evolvenet.prune(model, evolvenet.trace(model, X[:2]), {"blocks.0.mlp.0": 9})
    remove_blocks(model, X)
    evolvenet.prune(model, evolvenet.trace(model, X[:2]), {"blocks.0.mlp.0": 5})
    evolvenet.save(model, tmp_path / f"net.{ending}")
    again: Any = evolvenet.load(Net().double(), tmp_path / f"net.{ending}")
    assert torch.equal(again(X), model(X))
    assert isinstance(again.blocks[1], RemovedBlock)


def test_an_evolver_goes_on_with_what_is_left_and_resumes(tmp_path: Path) -> None:
    def evolver(model: Any) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        return evolvenet.Evolver(model, optimizer, evolvenet.Budget(params=200, by=0.5), X)

    first = evolver(model := net())
    first.copies = [average := copy.deepcopy(model)]
    first.observe(X)
    assert first.remove_blocks() == ("blocks.1", "blocks.2.mlp")
    assert first.remove_blocks() == ()
    event = first.step(progress=0.5)
    assert event.skipped is None
    assert event.changes
    assert [each.shape for each in average.parameters()] == [each.shape for each in model.parameters()]
    assert {id(p) for p in first.optimizers[0].param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    evolvenet.save(model, tmp_path / "net.pt")
    second = evolver(evolvenet.load(Net().double(), tmp_path / "net.pt"))
    second.load_state_dict(first.state_dict())
    assert second.graph.sizes == first.graph.sizes
    assert torch.equal(second.model(X), model(X))
    second.observe(X)
    assert second.step(progress=0.9).skipped is None


def small_llama(**more: Any) -> Any:
    """A decoder of two layers, or of other sizes."""
    sizes: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | more))).eval()


def test_a_layer_leaves_a_decoder_with_its_place_in_the_cache(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = small_llama(num_hidden_layers=3, num_key_value_heads=1)
    layer = model.model.layers[1]
    nn.init.zeros_(layer.self_attn.o_proj.weight)
    nn.init.zeros_(layer.mlp.down_proj.weight)
    # Of an attention alone the last layer goes, since the rest keeps its place in the cache; an MLP goes whole.
    nn.init.zeros_(model.model.layers[0].self_attn.o_proj.weight)
    nn.init.zeros_(model.model.layers[2].mlp.down_proj.weight)
    words = {"input_ids": torch.randint(0, 40, (2, 7))}
    with torch.no_grad():
        before = model(**words).logits
        said = model.generate(**words, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert list(remove_blocks(model, words)) == [
            "model.layers.0.self_attn.o_proj", "model.layers.1", "model.layers.2.mlp",
        ]  # fmt: skip
        assert torch.equal(model(**words).logits, before)
        assert (model.config.num_hidden_layers, len(model.model.layers)) == (2, 2)
        assert [each.self_attn.layer_idx for each in model.model.layers] == [0, 1]
        for cached in (True, False):
            options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "use_cache": cached}
            assert torch.equal(model.generate(**words, **options), said)
        graph = evolvenet.trace(model, words)
        evolvenet.prune(model, graph, {"model.layers.0.mlp.gate_proj": 12})
        evolvenet.transformers.save_pretrained(model, tmp_path)
        assert torch.equal(evolvenet.transformers.from_pretrained(tmp_path)(**words).logits, model(**words).logits)


def test_without_a_layer_the_transformers_library_alone_loads_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = small_llama()
    nn.init.zeros_(model.model.layers[0].self_attn.o_proj.weight)
    nn.init.zeros_(model.model.layers[0].mlp.down_proj.weight)
    words = {"input_ids": torch.randint(0, 40, (2, 7))}
    with torch.no_grad():
        assert list(remove_blocks(model, words)) == ["model.layers.0"]
        assert evolvenet.transformers.save_pretrained(model, tmp_path, example_inputs=words)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(**words).logits, model(**words).logits)


def test_lists_that_are_as_long_as_there_are_layers_by_chance_stay() -> None:
    model = small_llama(eos_token_id=[1, 2])
    for projection in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
        nn.init.zeros_(projection.weight)
    inputs = {"input_ids": torch.randint(0, 32, (2, 5))}
    assert list(evolvenet.remove_blocks(model, inputs)) == ["model.layers.1"]
    assert (model.config.num_hidden_layers, model.config.eos_token_id) == (1, [1, 2])


def test_a_block_that_writes_to_its_input_is_no_idle_one() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            x += self.inner(x)
            return x

    model = nn.Sequential(nn.Linear(4, 4), InPlace(), nn.Linear(4, 2))
    assert "1" not in observe_blocks(model, [torch.randn(3, 4)])


class Layer(nn.Module):
    """Returns a tuple, as layers of older releases of transformers do."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.layer_idx, self.up = place, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.up(x), None


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(place) for place in range(3))
        self.config = SimpleNamespace(num_hidden_layers=3, layer_types=["a", "b", "c"], other=[1, 2])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)[0]
        return x


def stack() -> Any:
    torch.manual_seed(0)
    model: Any = Stack()
    nn.init.zeros_(model.layers[1].up.weight)
    nn.init.zeros_(model.layers[1].up.bias)
    return model


def test_a_layer_that_returns_a_tuple_leaves_with_its_entry_of_the_configuration() -> None:
    model, x = stack(), torch.randn(5, 4)
    before = model(x)
    assert remove_blocks(model, x) == {"layers.1": 0.0}
    assert torch.equal(model(x), before)
    assert vars(model.config) == {"num_hidden_layers": 2, "layer_types": ["a", "c"], "other": [1, 2]}
    assert [layer.layer_idx for layer in model.layers] == [0, 1]


def test_what_is_only_tried_is_put_back() -> None:
    model, x = stack(), torch.randn(5, 4)
    layers = list(model.layers)
    assert [each.path for each in find_removals(model, [x], 0.0, lambda _: energy_limit(0.0))] == ["layers.1"]
    assert list(model.layers) == layers
    assert [layer.layer_idx for layer in layers] == [0, 1, 2]
    assert vars(model.config) == {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "other": [1, 2]}


def test_a_load_that_fails_puts_back_what_counts_the_layers(tmp_path: Path) -> None:
    model, x = stack(), torch.randn(5, 4)
    remove_blocks(model, x)
    evolvenet.save(model, tmp_path / "short.pt", x)
    other = stack()
    for layer in other.layers:
        layer.up = nn.Linear(4, 4).half()
    layers, count = other.layers, vars(other.config).copy()
    with pytest.raises(evolvenet.RecordError):
        evolvenet.load(other, tmp_path / "short.pt")
    assert other.layers is layers
    assert [layer.layer_idx for layer in other.layers] == [0, 1, 2]
    assert vars(other.config) == count


def test_layers_that_are_put_back_are_like_the_rest(tmp_path: Path) -> None:
    model, x = stack().eval(), torch.randn(5, 4)
    evolvenet.save(model, tmp_path / "whole.pt", x)
    remove_blocks(model, x)
    model.double().train()
    evolvenet.load(model, tmp_path / "whole.pt")
    assert all(module.training for module in model.modules())
    assert {each.dtype for each in model.parameters()} == {torch.float64}
    assert vars(model.config) == vars(stack().config)


class WithBuffer(nn.Module):
    """A residual block of bfloat16 parameters with a buffer in float32, as of a rotary embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.frequency: Tensor
        self.register_buffer("frequency", torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner((x * self.frequency).to(torch.bfloat16))


def mixed() -> nn.Sequential:
    """Two such blocks and a layer."""
    return nn.Sequential(WithBuffer(), WithBuffer(), nn.Linear(4, 2, dtype=torch.bfloat16))


def without_block(model: nn.Sequential) -> RemovedBlock:
    """What stands for the second block, once it is in its place."""
    removal = RemovedBlock(model[1], PASSES)
    exchange_modules(model, {model[1]: removal}, ExitStack())
    return removal


def test_a_buffer_of_a_block_that_is_put_back_keeps_a_type_of_its_own() -> None:
    model = mixed()
    before = {name: tensor.dtype for name, tensor in model[1].state_dict().items()}
    restored = whole_in(model, without_block(model))
    assert {name: tensor.dtype for name, tensor in restored.state_dict().items()} == before


def test_a_block_that_is_put_back_has_the_type_that_the_model_was_given_meanwhile() -> None:
    model = mixed().float()
    removal = without_block(model)
    restored = whole_in(model.double(), removal)
    assert {tensor.dtype for tensor in restored.state_dict().values()} == {torch.float64}


@pytest.mark.parametrize(
    "change", [{"whole": None}, {"whole": 5}, {"type": [1]}, {"type": "of no kind"}, {"returns": 3}]
)
def test_an_edited_record_of_a_block_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    model = mixed()
    without_block(model)
    state: Any = model.state_dict()
    [record] = [each[REPLACEMENT_KEY] for each in state._metadata.values() if REPLACEMENT_KEY in each]
    record.update(change)
    torch.save(state, tmp_path / "edited.pt")
    with pytest.raises(evolvenet.RecordError):
        evolvenet.load(mixed(), tmp_path / "edited.pt")


def test_a_file_without_a_layer_is_loaded_into_a_model_that_was_built_without_it(tmp_path: Path) -> None:
    model, x = stack(), torch.randn(5, 4)
    remove_blocks(model, x)
    evolvenet.save(model, tmp_path / "short.pt", x)
    torch.save(nn.Sequential(model).state_dict(), tmp_path / "inside.pt")
    for file in ("short.pt", "inside.pt"):
        short = stack()
        del short.layers[2]
        assert torch.equal(evolvenet.load(short, tmp_path / file)(x), model(x))


class Two(nn.Module):
    """Two lists of as many layers, each with a configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = stack(), Stack()
        self.config = SimpleNamespace(num_hidden_layers=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x))


def test_only_the_configuration_of_the_list_counts_its_layers() -> None:
    model = Two()
    assert list(remove_blocks(model, torch.randn(5, 4))) == ["one.layers.1"]
    counts = [each.config.num_hidden_layers for each in (model, model.one, model.other)]
    assert counts == [3, 2, 3]


def test_lists_for_each_layer_are_cut_and_where_one_is_not_understood_layers_stay() -> None:
    model = stack()
    model.config.no_rope_layers, model.config.eos_token_id = [1, 0, 1], [7, 8, 9]
    remove_blocks(model, torch.randn(5, 4))
    assert (model.config.no_rope_layers, model.config.eos_token_id) == ([1, 1], [7, 8, 9])
    for name, value in (("scales", [1.0, 2.0, 3.0]), ("mlp_only_layers", [2])):
        model = stack()
        setattr(model.config, name, value)
        assert "layers.1" not in remove_blocks(model, torch.randn(5, 4))
        assert len(model.layers) == 3


def test_blocks_are_observed_under_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.randn(5, 4)
        assert "layers.1" in observe_blocks(stack(), [x])
    assert "layers.1" in observe_blocks(stack(), [x])
