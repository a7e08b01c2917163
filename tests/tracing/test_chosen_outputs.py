"""Outputs that count: which widths they fix, from the trace up to runs, files and errors."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import evolvenet
from evolvenet.errors import OutputNameError
from evolvenet.execution.chosen_outputs import Outputs, chosen, normalized, with_chosen_outputs
from evolvenet.execution.step import InTurn, Step, run_model
from evolvenet.graph.coverage import OUTPUT
from evolvenet.graph.renaming import in_parent, renamed
from evolvenet.graph.serialization import from_state_dict, to_state_dict
from tests.helpers.networks import EncoderDecoder
from tests.helpers.policies import Fixed

TOKENS = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0))


def network() -> EncoderDecoder:
    torch.manual_seed(0)
    return EncoderDecoder().eval()


def fixed_by_outputs(outputs: Outputs | None) -> set[int]:
    """Sizes of the widths inside of the network that are frozen as its outputs."""
    graph = evolvenet.trace(network(), TOKENS, outputs)
    return {width.size for width in graph.widths.values() if width.frozen == OUTPUT} - {5}


def logits_of(returned: dict[str, Any]) -> Tensor:
    return returned["logits"]


@pytest.mark.parametrize(
    ("outputs", "fixed"),
    [
        (None, {12}),
        ("logits", set[int]()),
        (logits_of, set[int]()),
        (["logits"], set[int]()),
        ("0", set[int]()),
        ("encoder.states", {12}),
        (("logits", "encoder"), {12}),
    ],
)
def test_only_chosen_outputs_fix_widths(outputs: Outputs | None, fixed: set[int]) -> None:
    found = fixed_by_outputs(outputs)
    assert found == fixed


def test_keys_and_values_fix_their_heads_and_nothing_else() -> None:
    model = network()
    graph = evolvenet.trace(model, TOKENS, "past")
    fixed = {name for name, width in graph.widths.items() if width.frozen == OUTPUT}
    assert fixed
    assert all(name.startswith("decoder.0.attend") for name in fixed)


def test_what_other_outputs_would_fix_grows_exactly_and_is_cut() -> None:
    model = network()
    graph = evolvenet.trace(model, TOKENS, "logits")
    before = model(TOKENS)["logits"]
    name = graph.widths["encoder.0.down"].name
    evolvenet.grow(model, graph, {"encoder.0.up": 40, "decoder.0.up": 24})
    assert torch.allclose(model(TOKENS)["logits"], before, atol=1e-6)
    graph = evolvenet.prune(model, evolvenet.trace(model, TOKENS, "logits"), {name: 7}, batches=[TOKENS])
    returned = model(TOKENS)
    assert returned["encoder"]["states"].shape[-1] == 7
    assert returned["logits"].shape == before.shape
    assert graph.outputs == ("logits",)


class Named(NamedTuple):
    logits: Tensor
    states: tuple[Tensor, ...]


@dataclasses.dataclass
class Record:
    logits: Tensor
    states: tuple[Tensor, ...]
    loss: Tensor | None = None


class Cache:
    def __init__(self, *layers: Tensor) -> None:
        self.layers = list(layers)


ONE, TWO = torch.ones(1), torch.full((1,), 2.0)


@pytest.mark.parametrize(
    ("returned", "path", "found"),
    [
        ((ONE, TWO), "1", [TWO]),
        ([ONE, (ONE, TWO)], "-1", [ONE, TWO]),
        (Named(ONE, (ONE, TWO)), "states.1", [TWO]),
        (Record(ONE, (TWO,)), "states", [TWO]),
        ({"a.b": TWO, "a": {"b": ONE}}, "a.b", [TWO]),
        ({"a": {"b": TWO}}, "a.b", [TWO]),
        ({1: TWO, 0: ONE}, "1", [TWO]),
        ({"logits": ONE, "states": TWO}, "1", [TWO]),
        ({"cache": Cache(ONE, TWO)}, "cache", [ONE, TWO]),
        ({"cache": Cache(ONE, TWO)}, "cache.layers.0", [ONE]),
    ],
)
def test_a_path_leads_through_every_kind_of_output(returned: Any, path: str, found: list[Tensor]) -> None:
    assert [tensor.item() for tensor in chosen(returned, (path,))] == [tensor.item() for tensor in found]


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ("logit", r"outputs='logit'.* got 'logit'. There is a dict with 'logits', 'encoder', 'past'"),
        ("encoder.state", r"got 'state'. At 'encoder' is a dict with 'states'\."),
        ("encoder.mask", "expected tensors, got None"),
        (["logits", "past.2"], "got '2'. At 'past' is a list with '0'"),
        ("logits.0", "At 'logits' is a Tensor without names"),
    ],
)
def test_an_unknown_name_is_refused_with_the_names_there_are(outputs: Outputs, expected: str) -> None:
    with pytest.raises(OutputNameError, match=expected):
        evolvenet.trace(network(), TOKENS, outputs)


@pytest.mark.parametrize("outputs", [3, [], [1], ["a", None]])
def test_other_things_than_names_are_refused(outputs: Any) -> None:
    with pytest.raises(evolvenet.TraceError, match="Expected outputs as a name"):
        normalized(outputs)


def test_an_error_in_the_function_of_outputs_is_reported_as_its_own() -> None:
    with pytest.raises(evolvenet.TraceError, match=r"KeyError: 'missing'.* outputs"):
        evolvenet.trace(network(), TOKENS, lambda returned: returned["missing"])


def test_of_steps_and_runs_in_turn_the_outputs_of_each_are_chosen() -> None:
    model = nn.LSTM(2, 3)
    x = torch.zeros(4, 1, 2)
    step = Step(lambda model, x: {"last": model(x)[0][-1]}, x)
    assert [found.shape for found in run_model(model, with_chosen_outputs(step, ("last",)))] == [(1, 3)]
    both = run_model(model, with_chosen_outputs(InTurn((x, (x,))), ("0",)))
    assert [[tuple(tensor.shape) for tensor in found] for found in both] == [[(4, 1, 3)], [(4, 1, 3)]]


def test_numbers_are_compared_on_chosen_outputs_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.side = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.body(x)
            return self.head(x), self.side(x) / self.body.weight.shape[0]

    x = torch.randn(3, 4)
    assert evolvenet.trace(Net(), x).widths["body"].frozen is not None
    assert evolvenet.trace(Net(), x, "0").widths["body"].frozen is None


def test_names_are_kept_in_plain_data_and_functions_are_not() -> None:
    model = network()
    graph = evolvenet.trace(model, TOKENS, ["logits"])
    assert from_state_dict(to_state_dict(graph)) == graph
    assert graph.resized({}).outputs == ("logits",)
    assert renamed(graph, in_parent("")).outputs == ("logits",)
    assert renamed(graph, in_parent("net")).outputs is None
    by_function = evolvenet.trace(model, TOKENS, lambda returned: returned["logits"])
    assert from_state_dict(to_state_dict(by_function)) == dataclasses.replace(graph, outputs=None)
    evolvenet.prune(model, by_function, {"encoder.0.up": 20})
    assert isinstance(pickle.loads(pickle.dumps(model)), EncoderDecoder)


def test_allocate_measures_the_error_of_chosen_outputs() -> None:
    model = network()
    with torch.no_grad():
        # The states count for much, and the logits do not depend on them at all.
        model.between.weight.zero_()
    batches = [torch.randint(0, 20, (16, 6))]
    graph = evolvenet.trace(model, TOKENS, "logits")
    few = dataclasses.replace(graph, widths=graph.widths)
    sizes = evolvenet.allocate(model, few, graph.parameters * 3 // 4, batches)
    assert sizes["encoder.0.up"] < 24
    assert sizes["decoder.0.up"] == 20


def test_compress_cuts_streams_that_reach_other_outputs_alone() -> None:
    model = network()
    batches = [torch.randint(0, 20, (16, 6)) for _ in range(4)]
    before = sum(parameter.numel() for parameter in model.parameters())
    done = evolvenet.compress(model, TOKENS, batches, parameters=before // 4, outputs="logits", lowrank=False)
    assert done.after <= before // 4
    assert model(TOKENS)["logits"].shape == (2, 6, 5)


def test_files_are_read_and_written_with_chosen_outputs(tmp_path: Path) -> None:
    model = network()
    graph = evolvenet.trace(model, TOKENS, "logits")
    evolvenet.prune(model, graph, {graph.widths["encoder.0.down"].name: 7})
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded = evolvenet.load(network(), tmp_path / "weights.pt", example_inputs=TOKENS, outputs="logits").eval()
    assert torch.equal(loaded(TOKENS)["logits"], model(TOKENS)["logits"])
    table = evolvenet.widths(network(), TOKENS, outputs="logits")
    assert table["words"].frozen is None
    copied = pickle.loads(pickle.dumps(model))
    evolvenet.save(copied, tmp_path / "copied.pt", TOKENS, outputs="logits")
    assert torch.equal(
        evolvenet.load(network(), tmp_path / "copied.pt").eval()(TOKENS)["logits"], model(TOKENS)["logits"]
    )


def outputs_by(kind: str) -> Outputs:
    kinds: dict[str, Outputs] = {"a name": "logits", "a function": lambda returned: returned["logits"]}
    return kinds[kind]


@pytest.mark.parametrize("kind", ["a name", "a function"])
def test_an_evolver_resizes_what_other_outputs_would_fix_and_resumes(kind: str) -> None:
    def evolver_of(model: nn.Module, size: int) -> evolvenet.Evolver:
        optimizer = torch.optim.Adam(model.parameters())
        graph = evolvenet.trace(model, TOKENS, "logits")
        name = graph.widths["encoder.0.down"].name
        return evolvenet.Evolver(model, optimizer, Fixed({name: size}), TOKENS, outputs=outputs_by(kind))

    evolver = evolver_of(network(), 10)
    evolver.observe(torch.randint(0, 20, (64, 6)))
    assert evolver.step().skipped is None
    assert evolver.model(TOKENS)["encoder"]["states"].shape[-1] == 10
    state = evolver.state_dict()
    resumed = evolver_of(copy.deepcopy(evolver.model), 8)
    resumed.load_state_dict(state)
    assert resumed.graph.outputs == evolver.graph.outputs or kind == "a function"
    resumed.observe(torch.randint(0, 20, (64, 6)))
    assert resumed.step().skipped is None
    assert resumed.model(TOKENS)["encoder"]["states"].shape[-1] == 8


class Module(lightning.LightningModule):
    """Trains the logits; its steps are what the parent gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, tokens: Tensor) -> dict[str, Any]:
        return self.net(tokens)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0])["logits"].flatten(0, 1), batch[1].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def trained(**options: Any) -> evolvenet.WidthEvolution:
    data = torch.utils.data.TensorDataset(torch.randint(0, 20, (64, 6)), torch.randint(0, 5, (64, 6)))
    callback = evolvenet.WidthEvolution(policy=Fixed({}), every_n_steps=2, **options)
    trainer = lightning.Trainer(
        max_steps=3, callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        accelerator="cpu", enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=16))
    return callback


def is_free(callback: evolvenet.WidthEvolution, name: str) -> bool:
    assert callback.evolver is not None
    return callback.evolver.graph.widths[name].frozen is None


@pytest.mark.filterwarnings("ignore")
def test_in_a_trainer_outputs_decide_for_example_inputs_and_the_loss_for_all_else() -> None:
    assert is_free(trained(), "net.encoder.0.down")
    assert not is_free(trained(example_inputs=TOKENS), "net.encoder.0.down")
    assert is_free(trained(example_inputs=TOKENS, outputs="logits"), "net.encoder.0.down")
