"""The outputs of a model that count: by name, by path, or by a function of all that it returns.

A model may return more than anybody uses: embeddings, the states of an encoder, keys and values of a cache. A width that
reaches an output has to keep its size, so what is not used should not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from evolvenet.errors import OutputNameError
from evolvenet.execution.inputs import tensors_of
from evolvenet.execution.step import InTurn, Step, network_outputs, run_model
from evolvenet.graph.width_graph import ChosenOutputs, OutputFunction

Outputs = str | Sequence[str] | OutputFunction
"""A name ("logits"), a path ("encoder.last_hidden_state", "0"), several of them, or a function of the model's outputs."""

MOST_NAMES = 12
"""Names that an error lists."""

REMEDY = (
    "Give a name that is there, or a path such as 'encoder.0'; where the model returns others in train mode than in eval mode, "
    "give a function of what it returns."
)


def normalized(outputs: Outputs | None) -> ChosenOutputs:
    """Outputs as a graph keeps them: a tuple of paths, a function, or None for all.

    Raises:
        OutputNameError: for anything else, or an empty sequence.

    >>> normalized("logits"), normalized(["loss", "logits"]), normalized(None)
    (('logits',), ('loss', 'logits'), None)
    """
    if outputs is None or (callable(outputs) and not isinstance(outputs, str)):
        return outputs
    names = (outputs,) if isinstance(outputs, str) else outputs
    if isinstance(names, Iterable) and (found := tuple(names)) and all(isinstance(name, str) for name in found):
        return found
    raise OutputNameError(
        f"Expected outputs as a name, a path such as 'encoder.last_hidden_state' or '0', several of them, or a function of the "
        f"model's outputs, got {outputs!r}."
    )


def chosen(returned: Any, outputs: ChosenOutputs) -> Any:
    """The outputs that count, of all that a model has returned.

    Args:
        returned: tensors in lists, tuples, mappings, dataclasses or other objects, in any nesting.
        outputs: from `normalized`.

    Raises:
        OutputNameError: if there is no output of a name; the error says which names there are.

    Returns:
        For names the tensors that they hold, in one list; else what the function returns.

    >>> chosen({"logits": Tensor([1.0]), "states": (Tensor([2.0]), Tensor([3.0]))}, ("states.1", "logits"))
    [tensor([3.]), tensor([1.])]
    """
    if outputs is None:
        return returned
    if not isinstance(outputs, tuple):
        return outputs(returned)
    found: list[Tensor] = []
    for path in outputs:
        value = _at(returned, path)
        tensors = list(_tensors_in(value, set()))
        if not tensors:
            raise OutputNameError(f"outputs={path!r}: expected tensors, got {_described(value)}. {REMEDY}")
        found += tensors
    return found


def with_chosen_outputs(inputs: Any, outputs: ChosenOutputs) -> Any:
    """Inputs for `run_model` that make it return the outputs that count.

    >>> run_model(nn.LSTM(2, 3), with_chosen_outputs(Tensor([[1.0, 2.0]]), ("1.0",)))[0].shape
    torch.Size([1, 3])
    """
    if outputs is None:
        return inputs
    if isinstance(inputs, InTurn):
        return InTurn(tuple(with_chosen_outputs(each, outputs) for each in inputs.each))
    return Step(_RunAndChoose(outputs), inputs)


def counted_outputs(model: nn.Module, inputs: Any, outputs: ChosenOutputs = None) -> list[Tensor]:
    """Every tensor among the outputs that count, from a run of the model as it is, which autograd may record.

    >>> counted_outputs(nn.LSTM(2, 3), Tensor([[1.0, 2.0]]), ("1.0",))[0].requires_grad
    True
    """
    if outputs is None:
        return network_outputs(model, inputs)
    return tensors_of(run_model(model, with_chosen_outputs(inputs, outputs)))


@dataclass(frozen=True)
class _RunAndChoose:
    """Runs a model on its inputs and returns the outputs that count, for a `Step`."""

    outputs: ChosenOutputs

    def __call__(self, model: nn.Module, inputs: Any) -> Any:
        return chosen(run_model(model, inputs), self.outputs)


def _at(returned: Any, path: str) -> Any:
    """What lies at a path; a key that contains dots is found, too."""
    value, rest = returned, path
    while rest:
        fields = _fields(value)
        name, _, after = (rest, "", "") if rest in fields else rest.partition(".")
        if name not in fields and _is_index(name) and -len(fields) <= int(name) < len(fields):
            name = list(fields)[int(name)]
        if name not in fields:
            where = path[: len(path) - len(rest)].rstrip(".")
            raise OutputNameError(
                f"outputs={path!r}: expected the name of an output, got {name!r}. {f'At {where!r}' if where else 'There'} is "
                f"{_described(value)}. {REMEDY}"
            )
        value, rest = fields[name], after
    return value


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor in a value, also in objects that no `tree_leaves` opens: a cache of keys and values."""
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen and not isinstance(value, nn.Module):
        seen.add(id(value))
        for each in _fields(value).values():
            yield from _tensors_in(each, seen)


def _is_index(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _fields(value: Any) -> dict[str, Any]:
    """What a mapping, sequence, dataclass or other object holds, by name; nothing of a tensor."""
    if isinstance(value, Mapping):
        return {str(key): each for key, each in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, (list, tuple)):
        names = getattr(value, "_fields", None) or map(str, range(len(cast(Sequence[Any], value))))
        return dict(zip(names, cast(Sequence[Any], value), strict=True))
    if isinstance(value, Tensor) or not hasattr(value, "__dict__"):
        return {}
    return dict(vars(value))


def _described(value: Any) -> str:
    if value is None:
        return "None"
    names = [repr(name) for name, each in _fields(value).items() if each is not None]
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    listed = f"with {', '.join(names[:MOST_NAMES])}{more}" if names else "without names"
    return f"a {type(value).__name__} {listed}"
