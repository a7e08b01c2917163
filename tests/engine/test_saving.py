"""What `save` writes `load` brings back bit for bit, in every kind of file; a file of another model changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import evolvenet
from evolvenet import IndexMap
from evolvenet.errors import RecordError
from evolvenet.surgery.width_record import record_of
from experiments.coverage.small_networks import Tied
from tests.helpers.cases import CASES, Case, changed, distance, graph_of, outputs
from tests.helpers.runs import Classifier
from tests.helpers.states import State, same_bits

ENDINGS = (".pt", ".pth", ".ckpt", ".safetensors")


def mlp(classes: int = 2, inputs: int = 6, width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, classes))


def narrow(classes: int = 2, inputs: int = 6) -> nn.Sequential:
    """With five of eight units, changed by EvolveNet."""
    model = mlp(classes, inputs)
    evolvenet.prune(model, evolvenet.trace(model, torch.zeros(1, inputs)), {"0": 5})
    return model


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(same_bits(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_model_comes_back_bit_for_bit_from_every_kind_of_file(case: Case, tmp_path: Path) -> None:
    model, inputs = changed(case), case.inputs()
    graph = record_of(model).graph_of(model)  # type: ignore[union-attr]
    assert graph is not None
    expected = outputs(model, inputs)
    for ending in ENDINGS:
        evolvenet.save(model, tmp_path / f"model{ending}")
        fresh = evolvenet.load(case.model(), tmp_path / f"model{ending}")
        assert_same(fresh, model)
        assert distance(outputs(fresh, inputs), expected) == 0
        record = record_of(fresh)
        assert record is not None
        assert record.graph_of(fresh) == graph
        assert dict(record.original) == {width.name: width.size for width in graph_of(case).widths.values()}


def test_a_part_and_a_holder_of_a_saved_model_take_its_widths(tmp_path: Path) -> None:
    model = nn.ModuleDict({"net": narrow(), "head": nn.Linear(2, 2)})
    for ending in ENDINGS:
        evolvenet.save(model, tmp_path / f"whole{ending}")
        assert_same(evolvenet.load(mlp(), tmp_path / f"whole{ending}"), model["net"])
        whole = nn.ModuleDict({"net": mlp(), "head": nn.Linear(2, 2)})
        assert_same(evolvenet.load(whole, tmp_path / f"whole{ending}"), model)
        with pytest.raises(RecordError, match=r"expected 2\.weight of shape \(7, 8\), as in this model, got \(2, 5\)"):
            evolvenet.load(mlp(classes=7), tmp_path / f"whole{ending}")


def test_a_checkpoint_of_a_lightning_module_loads_with_its_hyperparameters(tmp_path: Path) -> None:
    import evolvenet.lightning.callback

    model = Classifier(lr=0.5)
    evolvenet.prune(model, evolvenet.trace(model, torch.zeros(2, 6)), {"net.0": 3, "net.4": 7})
    evolvenet.save(model, tmp_path / "net.ckpt")
    loaded = Classifier.load_from_checkpoint(tmp_path / "net.ckpt", weights_only=True)
    assert_same(loaded, model)
    assert dict(loaded.hparams) == {"width": 16, "lr": 0.5}

    class Other(Classifier):
        def __init__(self, **unused: Any) -> None:
            super().__init__()
            self.net[6] = nn.Linear(16, 4)

    for strict in (True, False):
        with pytest.raises(
            RecordError, match=r"expected net\.6\.weight of shape \(4, 16\), as in this model, got \(3, 7\)"
        ):
            Other.load_from_checkpoint(tmp_path / "net.ckpt", weights_only=True, strict=strict)


def test_factorized_layers_come_back_from_every_kind_of_file(tmp_path: Path) -> None:
    evolvenet.factorize(model := mlp(), {"0": 3})
    for ending in ENDINGS:
        evolvenet.save(model, tmp_path / f"factors{ending}")
        assert_same(evolvenet.load(mlp(), tmp_path / f"factors{ending}"), model)
        other = mlp(classes=7)
        before = State.of(other)
        with pytest.raises(RecordError, match=r"2\.weight of shape \(7, 8\), as in this model, got \(2, 8\)"):
            evolvenet.load(other, tmp_path / f"factors{ending}")
        assert before.differences(other) == []


def test_a_tied_weight_is_in_safetensors_once_and_loads_with_their_own_function(tmp_path: Path) -> None:
    model = Tied(tokens=20, size=6, inner=9)
    evolvenet.save(model, tmp_path / "tied.safetensors")
    fresh = Tied(tokens=20, size=6, inner=9)
    missing, unexpected = load_model(fresh, tmp_path / "tied.safetensors")
    assert not missing
    assert not unexpected
    assert_same(fresh, model)


def test_a_folder_with_the_parts_of_a_model(tmp_path: Path) -> None:
    state = narrow().state_dict()
    names = list(state)
    for k, part in enumerate((names[:2], names[2:])):
        save_file({name: state[name] for name in part}, tmp_path / f"part{k}.safetensors")
    index = {name: f"part{int(name in names[2:])}.safetensors" for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    loaded = evolvenet.load(mlp(), tmp_path).state_dict()
    assert all(same_bits(loaded[name], state[name]) for name in names)
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors.index.json").unlink()
    assert evolvenet.load(mlp(), tmp_path)[0].out_features == 5  # type: ignore[index]


@pytest.mark.parametrize("key", ["state_dict", "model", "weights_of_mine"])
def test_a_checkpoint_dict_holds_the_state_dict_under_some_key(key: str, tmp_path: Path) -> None:
    optimizer = torch.optim.Adam((model := narrow()).parameters())
    torch.save({key: model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, tmp_path / "c.pt")
    assert_same(evolvenet.load(mlp(), tmp_path / "c.pt"), model)


def test_a_copy_without_a_record_is_traced_on_example_inputs(tmp_path: Path) -> None:
    again = mlp(width=5)
    evolvenet.save(again, tmp_path / "bare.pt")
    assert "evolvenet" not in torch.load(tmp_path / "bare.pt", weights_only=True)._metadata[""]
    evolvenet.save(again, tmp_path / "known.pt", example_inputs=torch.zeros(1, 6))
    assert "evolvenet" in torch.load(tmp_path / "known.pt", weights_only=True)._metadata[""]


class HeadFirst(nn.Module):
    """Registered in another order than it runs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(width, 2), nn.Linear(6, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


def test_what_a_bare_state_dict_does_not_tell_a_trace_tells(tmp_path: Path) -> None:
    torch.save(HeadFirst(5).state_dict(), tmp_path / "bare.pt")
    model = HeadFirst(8)
    before = State.of(model)
    with pytest.raises(RecordError, match=r"expected head\.weight of shape \(2, 8\).*example_inputs="):
        evolvenet.load(model, tmp_path / "bare.pt")
    assert before.differences(model) == []
    loaded = evolvenet.load(model, tmp_path / "bare.pt", example_inputs=torch.zeros(1, 6))
    assert loaded.body.out_features == 5  # type: ignore[union-attr]
    torch.save(mlp(7).state_dict(), tmp_path / "classes.pt")
    with pytest.raises(RecordError, match=r"2\.weight of shape \(2, 8\).*got \(7, 8\).*is the model's output"):
        evolvenet.load(mlp(), tmp_path / "classes.pt", example_inputs=torch.zeros(1, 6))


class Heads(nn.Module):
    """Its code counts in a number of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.first, self.last = nn.Linear(6, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).view(-1, self.width).relu())


def test_numbers_that_a_bare_state_dict_does_not_hold_are_refused_and_a_trace_adapts_them(tmp_path: Path) -> None:
    torch.save(Heads(5).state_dict(), tmp_path / "bare.pt")
    before = State.of(model := Heads(8))
    with pytest.raises(RecordError, match=r"Its forward pass uses width = 8 \(1 such in all\).*example_inputs="):
        evolvenet.load(model, tmp_path / "bare.pt")
    assert before.differences(model) == []
    assert evolvenet.load(Heads(8), tmp_path / "bare.pt", example_inputs=torch.zeros(2, 6)).width == 5


class Attention(nn.Module):
    """Whole heads and places of all heads give the same shapes."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads, self.rows = width, heads, width
        self.query, self.out = nn.Linear(6, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self._divided(self.query(x)).softmax(-1).flatten(1))

    def _divided(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.heads, -1))


class Unused(Attention):
    """Its numbers serve the constructor, its size another method that nothing calls."""

    def _divided(self, x: Tensor) -> Tensor:
        return x[:, None]

    def described(self) -> int:
        return self.width


def test_numbers_of_which_shapes_do_not_tell_whether_they_follow_are_refused_if_the_computation_uses_them(
    tmp_path: Path,
) -> None:
    torch.save(Attention(6, 3).state_dict(), tmp_path / "bare.pt")
    with pytest.raises(RecordError, match=r"uses heads = 4 \(1 such in all\)"):
        evolvenet.load(Attention(8, 4), tmp_path / "bare.pt")
    assert evolvenet.load(Unused(8, 4), tmp_path / "bare.pt").heads == 4


def inconsistent() -> dict[str, Tensor]:
    """Eight units are produced and five consumed."""
    return {**mlp().state_dict(), "2.weight": torch.zeros(2, 5)}


def no_unit() -> dict[str, Tensor]:
    return {
        "0.weight": torch.zeros(0, 6),
        "0.bias": torch.zeros(0),
        "2.weight": torch.zeros(2, 0),
        "2.bias": torch.zeros(2),
    }


def lacking() -> dict[str, Tensor]:
    return {name: tensor for name, tensor in narrow().state_dict().items() if name != "2.bias"}


def normed(classes: int = 2) -> nn.Sequential:
    """Both weights are computed, from lengths and directions."""
    return nn.Sequential(weight_norm(nn.Linear(6, 8)), nn.ReLU(), weight_norm(nn.Linear(8, classes)))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "other classes": (lambda: mlp(classes=7), r"2\.weight of shape \(2, 8\), as in this model, got \(7, 8\)"),
    "other classes, narrow": (
        lambda: narrow(classes=7),
        r"2\.weight of shape \(2, 8\), as in this model, got \(7, 5\)",
    ),
    "other inputs": (lambda: mlp(inputs=9), r"0\.weight of shape \(8, 6\), as in this model, got \(8, 9\)"),
    "other inputs, narrow": (lambda: narrow(inputs=9), r"0\.weight of shape \(8, 6\), as in this model, got \(5, 9\)"),
    "deeper": (lambda: narrow().append(nn.Linear(2, 2)), r"unknown here .*3\.weight"),
    "shallower": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU()), r"lacks .*2\.weight"),
    "one entry missing": (lacking, r"lacks .*2\.bias"),
    "other layers": (lambda: nn.Sequential(nn.Conv1d(6, 8, 1), nn.ReLU(), nn.Linear(8, 2)), r"0\.weight with 2 axes"),
    "more precise": (lambda: narrow().double(), r"0\.weight of torch\.float32.*got torch\.float64.*model\.to"),
    "complex": (lambda: mlp().to(torch.complex64), r"0\.weight of torch\.float32.*got torch\.complex64"),
    "without values": (lambda: mlp().to("meta"), "expected 0.weight with data"),
    "inconsistent": (inconsistent, r"2\.weight of shape \(2, 8\), as in this model, got \(2, 5\)"),
    "no unit": (no_unit, r"0\.weight with at least one unit"),
    "no state dict": (lambda: {"epoch": 3}, "holds no state dict.*got epoch"),
    "no mapping": (lambda: [torch.zeros(2)], "holds a list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_of_another_model_is_refused_and_changes_nothing(name: str, tmp_path: Path) -> None:
    build, message = REFUSED[name]
    other = build()
    files = [tmp_path / "bare.pt"]
    torch.save(dict(other.state_dict()) if isinstance(other, nn.Module) else other, files[0])
    if isinstance(other, nn.Module) and name != "without values":
        files += [tmp_path / f"saved{ending}" for ending in (".pt", ".ckpt", ".safetensors")]
        for file in files[1:]:
            evolvenet.save(other, file)
    model = mlp()
    model(torch.randn(3, 6)).sum().backward()
    before = State.of(model, [optimizer := torch.optim.SGD(model.parameters(), lr=0.1)])
    for file in files:
        with pytest.raises(RecordError, match=message):
            evolvenet.load(model, file)
        assert before.differences(model, [optimizer]) == []


def test_a_computed_weight_is_no_partner_of_its_own_layer(tmp_path: Path) -> None:
    torch.save(normed(7).state_dict(), tmp_path / "other.pt")
    with pytest.raises(RecordError, match=r"2\..* of shape .*got \(7"):
        evolvenet.load(normed(), tmp_path / "other.pt")


def test_a_type_that_holds_all_of_the_files_numbers_may_differ(tmp_path: Path) -> None:
    evolvenet.save(model := narrow(), tmp_path / "single.pt")
    loaded = evolvenet.load(mlp().double(), tmp_path / "single.pt")
    assert torch.equal(loaded[0].weight, model[0].weight.double())  # type: ignore[index, arg-type]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_damaged_file_changes_nothing(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{ending}"
    evolvenet.save(narrow(), path)
    whole = path.read_bytes()
    model = mlp()
    before = State.of(model)
    for content in (whole[: len(whole) // 2], whole[:20], b"", b"not a file of this kind at all"):
        path.write_bytes(content)
        with pytest.raises(RecordError, match="cannot be read"):
            evolvenet.load(model, path)
    with pytest.raises(FileNotFoundError):
        evolvenet.load(model, tmp_path / f"nothing{ending}")
    assert before.differences(model) == []


class Breaks(nn.Linear):
    """Fails once it is loaded."""

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self.extra = 1
        raise MemoryError


def test_a_load_that_fails_half_way_changes_nothing(tmp_path: Path) -> None:
    """The first layer is reshaped and loaded by then, the batch norm loaded, the last one reshaped."""

    def build(width: int, last: type[nn.Linear]) -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Linear(width, 4), nn.Tanh(), last(4, 2))

    model = build(8, Breaks)
    model(torch.randn(5, 6)).sum().backward()
    torch.save(build(5, nn.Linear).state_dict(), tmp_path / "other.pt")
    before = State.of(model)
    with pytest.raises(MemoryError):
        evolvenet.load(model, tmp_path / "other.pt")
    assert before.differences(model) == []


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"calls": 3}

        def set_extra_state(self, state: Any) -> None:
            self.calls = state["calls"]

    evolvenet.save(mlp(), tmp_path / "model.safetensors")
    old = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(RecordError, match="_extra_state, got a dict"):
        evolvenet.save(Extra(2, 2), tmp_path / "model.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == old
    evolvenet.save(Extra(2, 2), tmp_path / "model.pt")
    assert evolvenet.load(Extra(2, 2), tmp_path / "model.pt").calls == 3
    with pytest.raises(RecordError, match=r"expected a file that ends in \.ckpt"):
        evolvenet.save(mlp(), tmp_path / "model.onnx")


def test_a_record_of_other_tensors_is_refused(tmp_path: Path) -> None:
    state = narrow().state_dict()
    evolvenet.save(narrow(), tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    state["0.weight"], state["0.bias"] = torch.zeros(4, 6), torch.zeros(4)
    torch.save(state, tmp_path / "b.pt")
    with pytest.raises(RecordError, match=r"expected 2\.weight of shape \(2, 5\), got \(2, 5\)|recorded in the file"):
        evolvenet.load(mlp(), tmp_path / "b.pt")


def test_a_width_that_is_frozen_by_now_may_have_its_first_size(tmp_path: Path) -> None:
    from dataclasses import replace

    from evolvenet.graph.width_graph import Widths
    from evolvenet.surgery.width_record import WidthRecord, remember

    model = mlp()
    graph = evolvenet.resize(model, evolvenet.trace(model, torch.zeros(1, 6)), {"0": IndexMap.keep(range(5), 8)})
    widths = Widths({name: replace(width, frozen="a module may need it") for name, width in graph.widths.items()})
    remember(model, WidthRecord.of(model, replace(graph, widths=widths), original={"0": 8}))
    evolvenet.save(model, tmp_path / "frozen.pt")
    assert_same(evolvenet.load(mlp(), tmp_path / "frozen.pt"), model)


def test_an_error_of_the_models_own_code_is_not_the_files(tmp_path: Path) -> None:
    class Own(nn.Linear):
        def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
            raise KeyError("own code")

    evolvenet.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(KeyError, match="own code"):
        evolvenet.load(Own(2, 2), tmp_path / "whole.pt")
