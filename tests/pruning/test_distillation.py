"""`polish`: after a cut, steps of gradient descent towards the outputs of the uncut network."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.errors import DistillationError, TraceError
from evolvenet.lowrank.factorize import factorize
from evolvenet.pruning import distillation, distillation_features, distillation_samples
from tests.helpers.states import State

Change = Callable[[Any], Any]


class Net(nn.Module):
    """With a norm, dropout, tied weights and a frozen parameter; cut by hand to a quarter of the width of its like."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, width), nn.BatchNorm1d(width)
        self.drop, self.second = nn.Dropout(0.5), nn.Linear(width, 6)
        self.last = nn.Linear(6, width, bias=False)
        self.last.weight = self.first.weight
        self.out = nn.Linear(width, 3)
        self.out.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.drop(torch.relu(self.norm(self.first(x))))
        return self.out(torch.relu(self.last(self.second(inside))))


def networks(double: bool = False) -> tuple[Net, Net]:
    """A teacher, and a narrower network."""
    torch.manual_seed(0)
    found = Net(32), Net(8)
    return (found[0].double(), found[1].double()) if double else found


def samples(dtype: torch.dtype = torch.float32, count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(24, 6, generator=generator).to(dtype) for _ in range(count)]


def returned(teacher: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [copy.deepcopy(teacher).eval()(batch) for batch in batches]


def test_the_outputs_come_nearer_and_nothing_else_changes() -> None:
    teacher, model = networks()
    model.out.weight.grad = torch.ones_like(model.out.weight)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    before, of_teacher = State.of(model), State.of(teacher)
    values = copy.deepcopy(model.state_dict())
    done = evolvenet.polish(model, teacher, samples(), steps=60)
    assert done.kept
    assert done.after < 0.8 * done.before
    assert done.steps == 60
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, values[name])}
    assert changed == trained | {"last.weight"}
    assert model.last.weight is model.first.weight
    # Parameters aside, all is as before: modes, buffers, gradients, random generators; the objects are the same ones.
    tensors = {f"{name.rpartition('.')[0]}._parameters" for name in changed}
    assert {each.rpartition(".")[0] for each in before.differences(model)} <= tensors
    assert of_teacher.differences(teacher) == []


def test_the_step_is_that_of_adam_on_the_squared_error_over_its_variance() -> None:
    teacher, model = networks(double=True)
    (batch,) = samples(torch.float64, 1)
    fitted, judged = batch[:-3], batch[-3:]
    slow = copy.deepcopy(model).eval()
    targets = copy.deepcopy(teacher).eval()(judged).detach()
    scale = (targets - targets.mean(0)).square().mean()
    adam = torch.optim.Adam([each for each in slow.parameters() if each.requires_grad], lr=1e-3)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(5))
    apart = slow(fitted[order]) - teacher.eval()(fitted[order]).detach()
    (apart.square().mean() / scale).backward()
    adam.step()
    done = evolvenet.polish(model, teacher, [batch], steps=1, rate=1e-3, batch_size=21, seed=5)
    assert done.kept
    for one, two in zip(slow.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    error = (slow(judged) - targets).square().sum() / (3 * targets.shape[1] * scale)
    assert done.after == pytest.approx(error.item(), rel=1e-10)


def test_outputs_of_the_teacher_do_as_well_as_the_teacher() -> None:
    teacher, model = networks()
    other = copy.deepcopy(model)
    one = evolvenet.polish(model, teacher, samples(), steps=5)
    two = evolvenet.polish(other, returned(teacher, samples()), samples(), steps=5)
    assert one.after == pytest.approx(two.after, rel=1e-4)


def test_where_outputs_are_too_large_to_be_kept_they_are_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, model = networks()
    other = copy.deepcopy(model)
    one = evolvenet.polish(model, teacher, samples(), steps=5)
    monkeypatch.setattr(distillation_samples, "LARGEST", 100)
    two = evolvenet.polish(other, teacher, samples(), steps=5)
    assert one.after == pytest.approx(two.after, rel=1e-4)


def test_changed_inputs_are_shown_to_both_networks() -> None:
    teacher, model = networks()
    given, shown = list[Tensor](), list[Tensor]()

    class Watched(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            shown.append(x)
            return self.net(x)

    def shifted(inputs: Tensor) -> Tensor:
        given.append(inputs + torch.randn(1) + np.random.rand())
        return given[-1]

    evolvenet.polish(Watched(model), Watched(teacher), samples(), steps=4, augment=shifted)
    assert len({float(each.sum()) for each in given}) == len(given) >= 4
    for each in given:
        assert sum(each.shape == other.shape and torch.equal(each, other) for other in shown) == 2


def test_a_rate_that_is_too_large_is_followed_by_smaller_ones() -> None:
    teacher, model = networks()
    done = evolvenet.polish(model, teacher, samples(), steps=40, rate=0.5)
    assert done.kept
    assert done.rate < 0.5
    assert done.after < done.before
    assert 40 < done.steps <= 120


def test_what_does_not_help_on_samples_held_out_is_undone(caplog: pytest.LogCaptureFixture) -> None:
    _, model = networks()
    # At the samples held out the network is right already, elsewhere it is told to change.
    batches = samples()
    outputs = returned(model, batches)
    outputs = [each + 5 for each in outputs[:-1]] + [outputs[-1] + 1e-4 * torch.randn(24, 3)]
    before = State.of(model)
    with caplog.at_level(logging.WARNING, "evolvenet"):
        done = evolvenet.polish(model, outputs, batches, steps=30)
    assert not done.kept
    assert done.after >= done.before
    assert before.differences(model) == []
    assert "the weights stay as they were" in caplog.text


@pytest.mark.parametrize("where", ["fitting", "judging", "weights"])
def test_without_a_number_the_weights_stay(where: str, caplog: pytest.LogCaptureFixture) -> None:
    teacher, model = networks()
    batches = samples()
    outputs = returned(teacher, batches)
    if where == "weights":
        model.out.weight.data[0, 0] = torch.nan
    else:
        outputs[0 if where == "fitting" else -1][-1, 0] = torch.nan
    before = State.of(model)
    done = evolvenet.polish(model, outputs, batches, steps=8)
    assert not done.kept
    assert before.differences(model) == []
    assert "nan" in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_after_an_exception_the_weights_are_those_from_before(error: type[BaseException]) -> None:
    teacher, model = networks()
    before, steps = State.of(model), list[int]()

    def failing(inputs: Tensor) -> Tensor:
        steps.append(1)
        if len(steps) == 5:
            raise error
        return inputs

    with pytest.raises(error):
        evolvenet.polish(model, teacher, samples(), steps=9, augment=failing)
    assert before.differences(model) == []


def test_dicts_tuples_and_several_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.one, self.two = nn.Linear(3, width), nn.Linear(width, 2), nn.Linear(width, 4)

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Any]:
            inside = torch.tanh(self.first(x))
            return {"one": self.one(inside), "parts": (self.two(inside) * scale, inside), "classes": inside.argmax(1)}

    torch.manual_seed(0)
    teacher, model = Two(16), Two(4)
    batches = [{"x": torch.randn(16, 3), "scale": torch.rand(16, 1)} for _ in range(3)]
    done = evolvenet.polish(model, teacher, batches, steps=40, outputs=["one", "parts.0"])
    assert done.kept
    given = [teacher(**batch) for batch in batches]
    assert evolvenet.polish(model, given, batches, steps=1, outputs=["one", "parts.0"]).before == pytest.approx(
        done.after
    )
    with pytest.raises(DistillationError, match=r"shapes that the teacher's have, \[\(6, 2\), \(6, 4\), \(6, 16\)\]"):
        evolvenet.polish(model, teacher, batches, steps=1)


class Sequences(nn.Module):
    """Time on the first axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn, self.out = nn.RNN(3, width), nn.Linear(width, 2)

    def forward(self, x: Tensor, count: int = 1) -> Tensor:
        return self.out(self.rnn(x)[0]) * count


def test_batches_that_cannot_be_taken_apart_are_taken_as_they_are() -> None:
    torch.manual_seed(0)
    teacher, model = Sequences(16), Sequences(4)
    batches = [torch.randn(length, 2, 3) for length in (4, 5, 6)]
    numbered = [(batch, 1) for batch in batches]
    for each in (batches, numbered):
        source, pairs = distillation_samples.with_targets(teacher, each, None)
        assert distillation_samples.together(model, source, pairs, False) is None
        assert distillation_samples.held_out(pairs, None, 64) == (pairs[:2], pairs[2:])
        assert evolvenet.polish(copy.deepcopy(model), teacher, each, steps=20).kept
    drawn = distillation_samples.minibatches([(batch, []) for batch in batches], None, 0)
    assert sorted(len(next(drawn)[0]) for _ in range(6)) == [4, 4, 5, 5, 6, 6]


def test_single_samples_are_drawn_where_their_outputs_are_their_own() -> None:
    teacher, model = networks()
    source, pairs = distillation_samples.with_targets(teacher, samples(), None)
    whole = distillation_samples.together(model, source, pairs, False)
    assert whole is not None
    fitting, judging = distillation_samples.held_out(pairs, whole, 8)
    assert [len(inputs) for inputs, _ in judging] == [8, 4]
    assert torch.equal(torch.cat([fitting[0][0], *(inputs for inputs, _ in judging)]), torch.cat(samples()))
    drawn = distillation_samples.minibatches(fitting, 20, 0)
    for _ in range(2):  # rounds of 84 samples: four minibatches, four samples are left out
        places = [torch.where((fitting[0][0] == row).all(1))[0].item() for _ in range(4) for row in next(drawn)[0]]
        assert len(set(places)) == 80


def test_factors_of_layers_are_trained_too() -> None:
    teacher, _ = networks()
    model = copy.deepcopy(teacher)
    model.last.weight = nn.Parameter(model.first.weight.detach().clone())
    factorize(model, {"second": 2, "last": 2})
    done = evolvenet.polish(model, teacher, samples(), steps=40)
    assert done.after < 0.9 * done.before


def test_sixteen_bits_are_trained_in_thirty_two() -> None:
    teacher, model = networks()
    half = copy.deepcopy(teacher).bfloat16(), copy.deepcopy(model).bfloat16()
    batches = [each.bfloat16() for each in samples()]
    done = evolvenet.polish(model, teacher, [each.float() for each in batches], steps=150, rate=1e-4)
    other = evolvenet.polish(half[1], half[0], batches, steps=150, rate=1e-4)
    assert {each.dtype for each in half[1].parameters()} == {torch.bfloat16}
    assert other.before - other.after > 0.7 * (done.before - done.after)


def test_under_inference_mode_too() -> None:
    teacher, model = networks()
    with torch.inference_mode():
        done = evolvenet.polish(model, teacher, [batch.clone() for batch in samples()], steps=10)
    assert done.kept


def test_what_cannot_be_done_is_said() -> None:
    teacher, model = networks()
    batches = samples()
    for options in ({"steps": -1}, {"rate": 0.0}, {"batch_size": 0}):
        with pytest.raises(DistillationError, match="expected steps of 0 or more"):
            evolvenet.polish(model, teacher, batches, **options)  # type: ignore[arg-type]
    with pytest.raises(DistillationError, match="expected a network as teacher"):
        evolvenet.polish(model, returned(teacher, batches), batches, augment=lambda inputs: inputs)
    with pytest.raises(DistillationError, match="each of 4 batches, got 1 entries"):
        evolvenet.polish(model, returned(teacher, batches[:1]), batches)
    with pytest.raises(DistillationError, match="floating-point"):
        evolvenet.polish(model, [batch.long() for batch in batches], batches)
    with pytest.raises(TraceError, match="at least one batch"):
        evolvenet.polish(model, teacher, [])
    with pytest.raises(DistillationError, match="parameters that require gradients, got none"):
        evolvenet.polish(model.requires_grad_(False), teacher, batches)
    assert evolvenet.polish(model.requires_grad_(), teacher, batches, steps=0).steps == 0


def test_ctrl_c_between_two_steps_ends_it() -> None:
    import signal

    teacher, model = networks()
    before = State.of(model)

    def pressed(inputs: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        return inputs

    with pytest.raises(KeyboardInterrupt):
        evolvenet.polish(model, teacher, samples(), steps=9, augment=pressed)
    assert before.differences(model) == []
    assert distillation.TRIES == 3


class Images(nn.Module):
    """Of two stages, each with a feature that can be compared."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stage, self.flat, self.dense = nn.Conv2d(1, width, 3), nn.Flatten(), nn.Linear(width * 4, width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.dense(torch.tanh(self.flat(self.stage(x))))))


def test_maps_of_features_fit_best_and_are_trained_along() -> None:
    torch.manual_seed(0)
    teacher, model = Images(6), Images(3)
    x = torch.randn(400, 1, 4, 4)
    names = distillation_features.feature_names(model, teacher, ["stage", "d*"])
    assert names == ["stage", "dense"]
    seen: list[dict[str, Tensor]] = []
    for net in (model, teacher):
        with torch.no_grad(), distillation_features.recorded(net, names) as found:
            net(x)
        seen.append(found)
    maps = distillation_features.FeatureMaps.of(*seen)
    assert [tuple(each.shape) for each in maps.weights] == [(6, 4), (6, 4)]
    errors = []
    for name in names:
        one, two = (each[name].double().movedim(1, -1).flatten(0, -2) for each in seen)
        one = torch.cat([one, torch.ones(len(one), 1)], 1)
        rest = two - one @ torch.linalg.lstsq(one, two).solution
        errors.append(float(rest.square().mean() / (two - two.mean(0)).square().mean()))
    assert float(maps.loss(*seen).detach()) == pytest.approx(sum(errors) / 2, rel=1e-3)
    start = copy.deepcopy(model)
    done = evolvenet.polish(model, teacher, list(x.split(50)), steps=60, features=["stage", "dense"])
    assert done.kept
    after: list[dict[str, Tensor]] = []
    for net in (model, teacher):
        with torch.no_grad(), distillation_features.recorded(net, names) as found:
            net(x)
        after.append(found)
    alone = copy.deepcopy(start)
    evolvenet.polish(alone, teacher, list(x.split(50)), steps=60)
    with torch.no_grad(), distillation_features.recorded(alone, names) as found:
        alone(x)
    fit = distillation_features.FeatureMaps.of
    assert fit(*after).loss(*after).item() < fit(found, after[1]).loss(found, after[1]).item()


def test_features_that_cannot_be_compared_are_refused() -> None:
    teacher, model = Images(6), Images(3)
    batches = [torch.randn(16, 1, 4, 4)]
    with pytest.raises(DistillationError, match="expected the name of a module that both networks have"):
        evolvenet.polish(model, teacher, batches, steps=1, features=["no*"])
    with pytest.raises(DistillationError, match="expected a network as teacher"):
        evolvenet.polish(model, returned(teacher, batches), batches, features=["stage"])
    theirs = {"stage": torch.zeros(16, 6, 2, 2)}
    with pytest.raises(DistillationError, match="differ in their channels alone"):
        distillation_features.FeatureMaps.of({"stage": torch.zeros(16, 3, 5, 5)}, theirs)
    with pytest.raises(DistillationError, match="Leave it out"):
        distillation_features.FeatureMaps.of({}, theirs)
