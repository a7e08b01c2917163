"""CIFAR-10's experiment: its network's parts shrink along, averages teach, and its control has the same widths."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from evolvenet import Front, trace
from evolvenet.engine.evolver import Evolver
from experiments.models.hybrid import HybridResNet, MixerBlock
from experiments.training import averaged_points
from experiments.training.averaged_points import AveragedPoints, averaged, teacher
from experiments.training.controls import from_scratch
from tests.helpers.experiments import configuration


def small() -> HybridResNet:
    return HybridResNet(widths=(8, 16, 24), mixers=(0, 1, 1), expansion=2)


def test_the_configured_network_is_large_and_its_policy_takes_it_through_both_sizes() -> None:
    config = configuration("+experiment=cifar_resnet")
    model, policy = instantiate(config.model), instantiate(config.evolve).policy
    count = sum(parameter.numel() for parameter in model.parameters())
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert isinstance(policy, Front)
    assert [point.params for point in policy.points][1:] == [250_000, 100_000]
    assert count >= 500_000
    wide = config.evolve.policy.points[0].params
    assert 0.98 * wide <= count <= wide, "nothing is cut in the first span"
    assert [sum(config.spans[:2]), config.spans[2]] == list(config.classifier.cycles), (
        "the first cut is inside of a cycle"
    )
    assert config.points.spans == config.cycles, "points are saved where the network has cooled down"
    assert config.points.teacher_spans == config.spans, "the wide network teaches as well"


def test_a_mixer_adds_its_input_and_mixes_each_place_by_itself_after_the_depthwise_convolution() -> None:
    block = MixerBlock(3, 5).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    nn.init.zeros_(block.project.weight)
    torch.testing.assert_close(block(x), x + block.project.bias[:, None, None])
    block = MixerBlock(3, 5).double()
    seen = block.depthwise(x)[:, :, 1, 2]
    inside = nn.functional.layer_norm(seen, (3,), block.norm.weight, block.norm.bias)
    expected = x[:, :, 1, 2] + block.project(nn.functional.gelu(block.expand(inside)))
    torch.testing.assert_close(block(x)[:, :, 1, 2], expected)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_stem_divides_the_resolution_by_its_stride(stride: int) -> None:
    stem = HybridResNet(widths=(8,), mixers=(0,), stem_stride=stride).stem
    assert stem(torch.randn(2, 3, 16, 16)).shape == (2, 8, 16 // stride, 16 // stride)
    assert stem.kernel_size[0] > stride, "neighbouring places overlap"


def test_stages_of_different_number_are_refused() -> None:
    with pytest.raises(ValueError, match="4 and 1"):
        HybridResNet(mixers=(1,))


@pytest.fixture(scope="module", name="evolved")
def _evolved() -> tuple[HybridResNet, Evolver]:
    """A small one, cut by the experiment's policy to 30 % of its parameters: too few for whole residual streams."""
    torch.manual_seed(0)
    model = small()
    count = sum(parameter.numel() for parameter in model.parameters())
    sizes = (count, 0.5 * count, 0.3 * count)
    points = [f"evolve.policy.points.{place}.params={size}" for place, size in enumerate(sizes)]
    policy = instantiate(configuration("+experiment=cifar_resnet", *points).evolve).policy
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    evolver = Evolver(model, [optimizer], policy, torch.randn(2, 3, 8, 8))
    for step, progress in enumerate((0.1, 0.5, 0.6, 0.9, 1.0)):
        x = torch.randn(32, 3, 8, 8)
        nn.functional.cross_entropy(model(x), torch.randint(0, 10, (32,))).backward()
        optimizer.step()
        optimizer.zero_grad()
        evolver.observe(x)
        evolver.step(at=step, progress=progress)
    return model, evolver


def test_depthwise_convolutions_and_layer_norms_shrink_along(evolved: tuple[HybridResNet, Evolver]) -> None:
    model, evolver = evolved
    before = small()
    events = evolver.history.events
    assert all(event.skipped is None for event in events)
    assert not events[0].changes, "wide in the first span"
    assert events[-1].parameters <= 0.3 * events[0].parameters
    narrower = 0
    for old, new in zip(before.blocks, model.blocks, strict=True):
        if not isinstance(old, MixerBlock):
            continue
        assert isinstance(new, MixerBlock)
        width = new.depthwise.weight.shape[0]
        assert new.depthwise.groups == new.depthwise.in_channels == new.depthwise.out_channels == width
        assert new.norm.normalized_shape == (width,)
        assert new.norm.weight.shape == new.norm.bias.shape == (width,)
        assert new.expand.out_features == new.project.in_features <= old.expand.out_features
        narrower += width < old.depthwise.out_channels
    assert narrower, "at least one residual stream lost channels"
    model.train()
    nn.functional.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.zeros(4, dtype=torch.long)).backward()


def test_the_control_has_the_points_widths_and_new_weights(
    evolved: tuple[HybridResNet, Evolver], tmp_path: Path
) -> None:
    model, _ = evolved
    torch.save(model.state_dict(), tmp_path / "point.ckpt")
    control = from_scratch(small(), tmp_path / "point.ckpt")
    assert isinstance(control, HybridResNet)
    assert [p.shape for p in control.parameters()] == [p.shape for p in model.parameters()]
    assert not torch.equal(control.stem.weight, model.stem.weight)
    assert trace(control, torch.randn(2, 3, 8, 8)).sizes == trace(model, torch.randn(2, 3, 8, 8)).sizes


def found(points: AveragedPoints, trainer: Run, module: nn.Module) -> None:
    """Notes a point without its checkpoint."""
    points.found.append(None)  # type: ignore[arg-type]


class Run:
    """As much of a trainer as the points look at, and a network whose weights move in every step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path, epochs: int = 4) -> None:
        monkeypatch.setattr(averaged_points.Points, "_save", found)
        self.module = instantiate(configuration("+experiment=cifar_resnet", "model.widths=[4,6,8]").classifier)
        self.module.bf16_above = None
        self.points, self.max_epochs, self.current_epoch = AveragedPoints([1, 1], directory), epochs, 0
        self.datamodule = self
        self.seen: list[list[Tensor]] = []
        self.batches = [(torch.randn(6, 3, 16, 16), None) for _ in range(3)]

    def train_dataloader(self) -> list[tuple[Tensor, None]]:
        return self.batches

    def epoch(self, number: int, steps: int = 5) -> None:
        self.current_epoch, self.seen = number, []
        self.points.on_train_epoch_start(self, self.module)  # type: ignore[arg-type]
        for batch in range(steps):
            with torch.no_grad():
                for parameter in self.module.model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            self.seen.append([parameter.detach().clone() for parameter in self.module.model.parameters()])
            self.points.on_train_batch_end(self, self.module, None, None, batch)  # type: ignore[arg-type]
        self.points.on_train_epoch_end(self, self.module)  # type: ignore[arg-type]


def test_the_average_of_a_spans_last_epoch_is_the_teacher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Run(monkeypatch, tmp_path)
    run.epoch(0)
    assert run.module.teacher is None
    run.epoch(1)
    assert run.module.teacher is not None
    expected = copy.deepcopy(run.module.model)
    with torch.no_grad():
        for parameter, *values in zip(expected.parameters(), *run.seen, strict=True):
            parameter.copy_(torch.stack(values).mean(0))
    for module in expected.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    expected.train()
    for images, _ in run.batches:
        expected(images)
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(run.module.teacher(x), expected.eval()(x), rtol=1e-3, atol=1e-3)
    before, first = run.module.teacher(x), run.module.teacher
    run.epoch(2)
    assert run.module.teacher is first, "within a span it stays"
    assert torch.equal(before, run.module.teacher(x))
    run.epoch(3)
    assert run.module.teacher is first, "nothing follows the last span"
    for mean, *values in zip(run.points._means, *run.seen, strict=True):
        torch.testing.assert_close(mean, torch.stack(values).mean(0), msg="each epoch has an average of its own")


def test_an_average_can_be_the_teacher_before_the_first_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Run(monkeypatch, tmp_path)
    run.points = AveragedPoints([1, 1], tmp_path, teacher_spans=[1, 2, 1])
    teachers = []
    for number in range(4):
        run.epoch(number)
        teachers.append(run.module.teacher)
        assert len(run.points.found) == [0, 1, 1, 2][number], "points are saved where their spans end"
    assert teachers[0] is not None, "the first teacher span ends"
    assert teachers[1] is teachers[0], "a point inside a teacher span"
    assert teachers[2] not in (None, teachers[0]), "the second teacher span ends"
    assert teachers[3] is teachers[2]


def test_a_change_of_widths_begins_a_new_average(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Run(monkeypatch, tmp_path)
    run.epoch(1)
    run.current_epoch = 1
    run.module.model.head = nn.Linear(8, 7)
    run.points.on_train_batch_end(run, run.module, None, None, 0)  # type: ignore[arg-type]
    last = [parameter.detach() for parameter in run.module.model.parameters()]
    assert all(torch.equal(one, two) for one, two in zip(run.points._means, last, strict=True))


def test_averaging_does_not_change_the_network() -> None:
    model = small()
    state = copy.deepcopy(model.state_dict())
    past = averaged(model, [torch.zeros_like(p) for p in model.parameters()], [(torch.randn(4, 3, 8, 8), None)])
    assert all(torch.equal(one, two) for one, two in zip(state.values(), model.state_dict().values(), strict=True))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training
    assert not past.training
    assert not any(parameter.requires_grad for parameter in past.parameters())
    assert torch.equal(past(torch.randn(2, 3, 8, 8)), torch.zeros(2, 10))


def test_a_teachers_outputs_are_float32_without_gradients_and_in_half_mode_of_bfloat16_precision() -> None:
    past, x = nn.Linear(4, 3), torch.randn(8, 4)
    whole, half = teacher(past, half=False)(x), teacher(past, half=True)(x)
    assert torch.equal(whole, past(x))
    assert not whole.requires_grad
    assert half.dtype == torch.float32
    assert torch.equal(half, half.bfloat16().float()), "bfloat16 inside"
