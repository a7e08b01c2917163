"""What training leaves behind: an ordinary module, that exports, compiles, copies and pickles as any other."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import lightning
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.utils.data import DataLoader, TensorDataset

from evolvenet import Evolver, Proposal, WidthEvolution
from evolvenet.measurement.width_statistics import WidthStatistics
from evolvenet.policies.base import PolicyContext
from evolvenet.surgery.checkpoint import reshape_before_load
from tests.helpers import networks
from tests.helpers.paths import ROOT
from tests.helpers.transformers_runs import bert, evolution, trainer

NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (networks.Mlp, (5,)),
    "resnet": (networks.ResNet, (3, 6, 6)),
    "transformer": (networks.transformer, (4, 5)),
    "depthwise": (networks.MobileNet, (3, 4, 4)),
    "grouped": (networks.ResNeXt, (3, 4, 4)),
}
SAMPLES = 48


class Breathes:
    """Cuts every width by a third at the first event, and grows what can grow by one step at each later one."""

    def __init__(self) -> None:
        self.events = 0

    def propose(self, context: PolicyContext) -> dict[str, Proposal]:
        self.events += 1
        known = context.statistics
        sizes = {name: self._size(each, context.graph.widths[name].smallest) for name, each in known.items()}
        return {name: Proposal(size, "breathes") for name, size in sizes.items() if size != known[name].size}

    def _size(self, each: WidthStatistics, smallest: int) -> int:
        if self.events > 1:
            return each.size + 1 if each.growable else each.size
        return max(each.size - max(each.size // 3, 1), smallest, 1)


class Task(lightning.LightningModule):
    """Knows nothing of EvolveNet."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def anatomy(model: nn.Module) -> dict[str, Any]:
    """What a model is made of beside its numbers: types, attributes, hooks of every kind, and what hangs on tensors."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[path] = (type(module), sorted(vars(module)), module.training)
        for name, value in vars(module).items():
            if "hook" in name:
                found[f"{path}.{name}"] = _names(value)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[name] = (type(tensor), sorted(vars(tensor)), tensor.is_leaf, tensor.requires_grad, _names(tensor))
    for name, value in vars(global_hooks).items():
        if name.startswith("_global_") and "hook" in name:
            found[name] = _names(value)
    return found


def _names(hooks: Any) -> Any:
    if isinstance(hooks, Tensor):
        return [_names(getattr(hooks, name)) for name in ("_backward_hooks", "_post_accumulate_grad_hooks")]
    if isinstance(hooks, Mapping):
        return [getattr(getattr(hook, "hook", hook), "__qualname__", str(hook)) for hook in hooks.values()]
    return [] if hooks is None else str(hooks)


def images(name: str, count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, *NETWORKS[name][1], generator=torch.Generator().manual_seed(seed))


def fit(name: str, *callbacks: lightning.Callback) -> Task:
    torch.manual_seed(0)
    task = Task(NETWORKS[name][0]())
    options: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    fitting = lightning.Trainer(
        max_epochs=3, accelerator="cpu", enable_checkpointing=False, callbacks=list(callbacks), **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitting.fit(task, DataLoader(TensorDataset(images(name, SAMPLES)), batch_size=SAMPLES // 2))
    return task


@cache
def trained(name: str) -> Task:
    """A task whose network's widths have shrunk and grown in a real run; not to be changed."""
    task = fit(name, evolution := WidthEvolution(Breathes(), every_n_epochs=1, stop=1.0))
    assert evolution.history is not None
    assert [bool(event.changes) for event in evolution.history.events] == [True, True]
    assert evolution.history.events[0].parameters < evolution.history.initial.parameters
    task.trainer = None  # type: ignore[assignment]
    return task.eval()


@pytest.fixture(params=NETWORKS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def net(name: str) -> nn.Module:
    return trained(name).net


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return {key: (one.get(key), other.get(key)) for key in {*one, *other} if one.get(key) != other.get(key)}


def test_fit_leaves_nothing_but_the_load_hooks(name: str) -> None:
    found = differences(anatomy(fit(name).eval()), anatomy(trained(name)))
    assert found == {"._load_state_dict_pre_hooks": ([], ["reshape_before_load"])}


def test_the_network_inside_is_as_it_was_built(name: str, net: nn.Module) -> None:
    assert differences(anatomy(NETWORKS[name][0]().eval()), anatomy(net)) == {}


def test_a_plain_loop_leaves_nothing(name: str) -> None:
    model = NETWORKS[name][0]()
    optimizer = torch.optim.AdamW(model.parameters())
    before = anatomy(model)
    evolver = Evolver(model, optimizer, Breathes(), images(name, 2))
    for _ in range(2):
        evolver.observe(images(name, SAMPLES))
        model(images(name, SAMPLES)).square().mean().backward()
        optimizer.step()
        assert evolver.step().changes
    assert differences(before, anatomy(model)) == {}


def test_the_transformers_callback_leaves_nothing_but_the_load_hooks(tmp_path: Path) -> None:
    plain, evolved = bert(), bert()
    trainer(tmp_path, plain).train()
    trainer(tmp_path, evolved, callback := evolution()).train()
    assert callback.history is not None
    assert callback.history.events[0].changes
    found = differences(anatomy(plain), anatomy(evolved))
    assert found == {"._load_state_dict_pre_hooks": ([], ["fit_replaced", "reshape_before_load"])}
    words = torch.arange(8)[None]
    again = pickle.loads(pickle.dumps(evolved)).eval()
    assert torch.equal(again(words).logits, evolved.eval()(words).logits)


def test_it_exports_with_any_batch_size(name: str, net: nn.Module) -> None:
    program = torch.export.export(net, (images(name, 3),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    other = images(name, 7, seed=2)
    torch.testing.assert_close(program.module()(other), net(other), rtol=1e-5, atol=1e-5)


def test_onnx_gives_the_same_numbers(name: str, net: nn.Module, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (images(name, 3),),
            tmp_path / "net.onnx",
            input_names=["x"],
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", options, providers=["CPUExecutionProvider"])
    other = images(name, 7, seed=2)
    (found,) = session.run(None, {"x": other.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), net(other), rtol=1e-5, atol=1e-5)


def test_it_compiles(name: str, net: nn.Module) -> None:
    torch._dynamo.reset()
    other = images(name, 7, seed=2)
    # Of a copy, since compiling marks the parameters.
    compiled = torch.compile(deepcopy(net), backend="aot_eager")
    torch.testing.assert_close(compiled(other), net(other), rtol=1e-5, atol=1e-5)


FRESH = """
import sys
import torch
torch.set_num_threads(1)
path, root = sys.argv[1:]
sys.path.insert(0, root)
for part in ("plain", "hooked"):
    for name, (model, inputs, outputs) in torch.load(f"{path}/{part}.pt", weights_only=False).items():
        torch.testing.assert_close(model(inputs), outputs, rtol=1e-6, atol=1e-6)
        print(part, name, "evolvenet" in sys.modules)
"""


def test_the_whole_module_loads_in_a_fresh_process(tmp_path: Path) -> None:
    plain = {name: (trained(name).net, images(name, 7), trained(name)(images(name, 7)).detach()) for name in NETWORKS}
    hooked = deepcopy(plain)
    for model, _, _ in hooked.values():
        model.register_load_state_dict_pre_hook(reshape_before_load)
    torch.save(plain, tmp_path / "plain.pt")
    torch.save(hooked, tmp_path / "hooked.pt")
    command = [sys.executable, "-c", FRESH, str(tmp_path), str(ROOT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [f"{part} {name} {part == 'hooked'}" for part in ("plain", "hooked") for name in NETWORKS]
    assert done.stdout.split("\n")[:-1] == expected


def copies(task: Task) -> Iterator[Task]:
    yield deepcopy(task)
    yield pickle.loads(pickle.dumps(task))


def test_copies_are_equal_apart_and_still_take_the_widths_of_what_is_loaded(name: str) -> None:
    task, inputs = trained(name), images(name, 7)
    wide = Task(NETWORKS[name][0]()).eval()
    expected = task(inputs)
    for copied in copies(task):
        assert differences(anatomy(task), anatomy(copied)) == {}
        assert torch.equal(copied(inputs), expected)
        hooks = copied._load_state_dict_pre_hooks.values()
        assert [getattr(hook, "hook", hook) for hook in hooks] == [reshape_before_load]
        copied.load_state_dict(wide.state_dict())
        assert torch.equal(copied(inputs), wide(inputs))
        assert torch.equal(task(inputs), expected)
