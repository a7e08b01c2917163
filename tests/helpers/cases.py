"""The one table of models that every part is tested against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from evolvenet.engine.functional import resize
from evolvenet.execution.inputs import arguments
from evolvenet.graph.index_map import IndexMap
from evolvenet.graph.width_graph import WidthGraph
from evolvenet.tracing.trace import trace
from experiments.coverage.small_networks import Tied, UNet
from tests.helpers import networks

FLOAT = torch.float64


@dataclass(frozen=True, eq=False)
class Case:
    """A model with what is known about its widths.

    Args:
        name: for the test's id.
        factory: makes the model.
        shapes: of the inputs, `(2, 5)`; a tuple of shapes for several, a dict of shapes for keyword arguments.
        sizes: the widths that can be resized, by name, with their number of units.
        mixed: those of them of which an op mixes the units (layer norm), so that growing cannot keep the function.
        frozen: other widths → a part of the reason.
        tokens: 0, or the vocabulary of inputs that are whole numbers.
    """

    name: str
    factory: Callable[[], nn.Module]
    shapes: Any
    sizes: Mapping[str, int]
    mixed: frozenset[str] = frozenset()
    frozen: Mapping[str, str] = field(default_factory=dict)
    tokens: int = 0

    def model(self, seed: int = 0) -> nn.Module:
        """The model in float64 and eval mode, with norms as after some training."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.factory().double().eval()
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if tensor.dim() == 1 and tensor.is_floating_point():
                    low = 0.5 if name.endswith(("running_var", "weight")) else -0.5
                    nn.init.uniform_(tensor, low, 1.5)
        return model

    def inputs(self, seed: int = 1) -> Any:
        """Example inputs, as `trace` takes them."""
        generator = torch.Generator().manual_seed(seed)

        def make(shape: tuple[int, ...]) -> Tensor:
            if self.tokens:
                return torch.randint(self.tokens, shape, generator=generator)
            return torch.randn(shape, dtype=FLOAT, generator=generator)

        if isinstance(self.shapes, dict):
            return {name: make(shape) for name, shape in self.shapes.items()}
        if isinstance(self.shapes[0], tuple):
            return tuple(make(shape) for shape in self.shapes)
        return make(self.shapes)

    def __str__(self) -> str:
        return self.name


@cache
def graph_of(case: Case) -> WidthGraph:
    """The case's graph, traced once: it is immutable and fits every model that the case makes."""
    return trace(case.model(), case.inputs())


def changed(case: Case) -> nn.Module:
    """The case's model with every second width up and the others down."""
    model = case.model(seed=3)
    graph = graph_of(case)
    maps = {
        name: IndexMap.grow(size, 2) if k % 2 else IndexMap.keep(range(1, size), size)
        for k, (name, size) in enumerate(graph.sizes.items())
    }
    resize(model, graph, maps)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Every tensor that the model answers with."""
    args, kwargs = arguments(inputs)
    return [leaf for leaf in tree_flatten(model(*args, **kwargs))[0] if isinstance(leaf, Tensor)]


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The same, in eval mode and without gradients."""
    with torch.no_grad():
        return run(model.eval(), inputs)


def distance(one: list[Tensor], two: list[Tensor]) -> float:
    """Largest relative difference between two answers."""
    assert [t.shape for t in one] == [t.shape for t in two]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-300)) for a, b in zip(one, two, strict=True))


def shuffled(size: int) -> IndexMap:
    """The units in another order, never the one that they have."""
    order = torch.randperm(size)
    return IndexMap.of(order.flip(0) if bool((order == torch.arange(size)).all()) else order, size)


def without_reasons(graph: WidthGraph) -> tuple[Any, ...]:
    """All that a graph says, but for the wording of the reasons, which name sizes."""
    widths = [replace(width, frozen=width.frozen and "yes") for width in graph.widths.values()]
    layouts = {name: dict(axes) for name, axes in graph.layouts.items()}
    return widths, layouts, dict(graph.shapes), graph.trainable, dict(graph.aliases)


def _channels_last() -> nn.Module:
    return networks.ResNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


VECTOR, IMAGE, STEPS, WORDS = (2, 5), (2, 3, 4, 4), (2, 3, 3), (2, 4)
RESNET = {"stem": 6, "blocks.0.conv1": 6, "blocks.1.conv1": 8, "blocks.1.conv2": 8, "blocks.2.conv1": 8}
OUTPUT = "is the model's output"
DATA = "fixed size"


def _recurrent(name: str, kind: type[nn.RNNBase], outputs: int, sizes: Mapping[str, int], **options: Any) -> Case:
    return Case(name, lambda: networks.Recurrent(kind, outputs, **options), STEPS, {"embed": 4, **sizes})


CASES = (
    Case("mlp", networks.Mlp, VECTOR, {"0": 12, "3": 9}, frozen={"6": OUTPUT, "0:in": DATA}),
    Case("conv", networks.ConvNet, (2, 3, 8, 8), {"0": 6, "4": 5, "7": 7}, frozen={"9": OUTPUT, "0:in": DATA}),
    Case("resnet", networks.ResNet, IMAGE, RESNET, frozen={"head": OUTPUT}),
    Case("channels_last", _channels_last, IMAGE, RESNET),
    Case("densenet", networks.DenseNet, IMAGE, {"stem": 6, "convs.0": 4, "convs.1": 5}),
    Case(
        "unet",
        partial(UNet, down=(5, 6, 7), up=(4, 4), last=5),
        IMAGE,
        {"down1": 5, "down2": 6, "bottom": 7, "up2": 4, "merge2": 6, "up1.1": 4, "merge1": 5},
        frozen={"head": OUTPUT},
    ),
    Case("mobilenet", networks.MobileNet, IMAGE, {"stem": 4, "expand": 8, "excite.reduce": 3}),
    Case("resnext", networks.ResNeXt, IMAGE, {"stem": 4, "mix": 3}),
    Case("group_norm", networks.GroupNormNet, IMAGE, {"0": 4, "3": 6, "6": 5}, mixed=frozenset({"3"})),
    Case("layer_norm", networks.LayerNormMlp, VECTOR, {"embed": 8, "up": 12}, mixed=frozenset({"embed"})),
    Case(
        "embedding",
        networks.BagOfWords,
        WORDS,
        {"embed": 6, "hidden": 7},
        frozen={"embed.weight[0]": "looks its rows up by data"},
        tokens=20,
    ),
    Case(
        "tied_weights",
        partial(Tied, tokens=20, size=6, inner=9),
        WORDS,
        {"down": 6, "up": 9},
        frozen={"embed": "looks its rows up by data"},
        tokens=20,
    ),
    _recurrent("rnn", nn.RNN, 5, {"cell": 5}),
    _recurrent("lstm", nn.LSTM, 5, {"cell": 5}),
    _recurrent("lstm_projected", nn.LSTM, 3, {"cell": 12, "cell#2": 3}, hidden_size=12, proj_size=3),
    _recurrent("lstm_deep", nn.LSTM, 10, {"cell": 5}, num_layers=2, bidirectional=True, dropout=0.1),
    _recurrent("gru", nn.GRU, 5, {"cell": 5}),
    _recurrent("gru_deep", nn.GRU, 10, {"cell": 5}, num_layers=2, bidirectional=True),
    Case(
        "factorized",
        networks.factorized,
        IMAGE,
        {"0.0": 4, "0.3": 6, "3.0": 4, "3.1": 5, "3.2": 9, "7.0": 3, "7.1": 8},
        frozen={"9": OUTPUT},
    ),
    Case("glu", networks.Gated, VECTOR, {"gate": 6, "hidden": 7}),
    Case("pixel_shuffle", networks.SuperResolution, IMAGE, {"0": 3, "3": 5}),
    Case("conv1d", networks.Sounds, (2, 2, 16), {"0": 6, "4": 5}),
    Case("conv3d", networks.Volumes, (2, 1, 4, 4, 4), {"0": 4, "4": 5}),
    Case("reused", networks.Reused, VECTOR, {"embed": 8}),
    Case(
        "two_inputs",
        networks.TwoInputs,
        (IMAGE, (2, 4)),
        {"see": 6, "read": 5, "join": 8},
        frozen={"label": OUTPUT, "echo": DATA, "read:in": DATA},
    ),
    Case("keywords", networks.TwoInputs, {"vector": (2, 4), "image": IMAGE}, {"see": 6, "read": 5, "join": 8}),
    Case("auxiliary", networks.Auxiliary, VECTOR, {"body": 8, "extra": 6}, frozen={"extra_head": OUTPUT}),
    Case("hard_coded", networks.HardCoded, IMAGE, {"mix": 7}, frozen={"stem": "a trial raised RuntimeError"}),
    Case("own_parameters", networks.OwnParameters, VECTOR, {"embed": 8, "matrix": 6}),
    Case("in_place", networks.InPlace, VECTOR, {"one": 8, "gate": 7}),
    Case("locked", networks.Locked, VECTOR, {"body.0": 8}),
    Case("peeking", networks.Peeking, VECTOR, {"body": 8, "hidden": 6}),
    Case("attention", networks.Attention, (2, 4, 5), {"embed": 4, "hidden": 7}, mixed=frozenset({"embed"})),
    Case("transformer", networks.transformer, (2, 4, 5), {"0": 4, "1.linear1": 12}, mixed=frozenset({"0"})),
)
