"""Names of a model's tensors: every parameter and buffer once, under its first name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from evolvenet._compat.torch import own_tensors


def tensor_named(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of a name.

    >>> tensor_named(nn.BatchNorm1d(2), "running_mean")
    tensor([0., 0.])
    """
    path, _, local = name.rpartition(".")
    return own_tensors(model.get_submodule(path))[local]


WRAPPED = ("base_layer", "original_module")
"""Names under which a layer lies in an adapter that has taken its place (PEFT)."""


def holder_of(path: str) -> str:
    """Path of the module that holds a layer, also where an adapter has taken the layer's place.

    >>> holder_of("attention.query"), holder_of("attention.query.base_layer")
    ('attention', 'attention')
    """
    parts = path.split(".")[:-1] if path.rpartition(".")[2] in WRAPPED else path.split(".")
    return ".".join(parts[:-1])


def and_above(path: str) -> Iterator[str]:
    """A module's path and those of the modules that hold it, the nearest first and the model last.

    >>> list(and_above("blocks.0.fc"))
    ['blocks.0.fc', 'blocks.0', 'blocks', '']
    """
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def named_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], frozenset[str]]:
    """Every parameter and every real or complex buffer once by its first name, the other names, and which are parameters."""
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    trainable: set[str] = set()
    entries = [(n, t, True) for n, t in model.named_parameters(remove_duplicate=False)]
    entries += [
        (n, t, False) for n, t in model.named_buffers(remove_duplicate=False) if t.is_floating_point() or t.is_complex()
    ]
    for name, tensor, is_parameter in entries:
        known = first.setdefault(id(tensor), name)
        if known != name:
            aliases[name] = known
            continue
        tensors[name] = tensor
        if is_parameter:
            trainable.add(name)
    return tensors, aliases, frozenset(trainable)
