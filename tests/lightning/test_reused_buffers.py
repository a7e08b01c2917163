"""Batches that are kept for an event are copies: loaders may write every batch into the same memory."""

import pytest
import torch
from torch import nn

import evolvenet
from evolvenet._compat.torch import tree_leaves
from evolvenet.engine.batch_buffer import BatchBuffer
from tests.helpers.runs import Batches, Classifier, fresh, trainer


class OneBuffer(Batches):
    """The same batches, each written over the one before it."""

    def __iter__(self):
        kept = None
        for batch in super().__iter__():
            kept = [each.clone() for each in batch] if kept is None else kept
            for own, new in zip(kept, batch, strict=True):
                own.copy_(new)
            yield kept[0], kept[1]


class TwoNetworks(Classifier):
    """A step that is traced as a whole, so that batches are kept rather than calls."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 3))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self.net(batch[0])), batch[1])


def seen_by_events(module, batches, tmp_path, monkeypatch):
    """The batches that the first event measures on."""
    found = []
    gather = BatchBuffer.gather

    def gathered(self, group):
        batches, gradients = gather(self, group)
        found.append([tensor.clone() for pair in self._kept for tensor in tree_leaves(pair[0])])
        return batches, gradients

    monkeypatch.setattr(BatchBuffer, "gather", gathered)
    policy = evolvenet.Threshold(prune=0.5)
    evolution = evolvenet.WidthEvolution(policy, every_n_steps=5, calibration_batches=4)
    trainer(tmp_path, [evolution], max_epochs=2).fit(module, batches)
    return found[0]


@pytest.mark.parametrize("build", [fresh, TwoNetworks])
def test_an_event_measures_on_the_batches_as_they_were(build, tmp_path, monkeypatch):
    usual = seen_by_events(build(), Batches(), tmp_path, monkeypatch)
    one = seen_by_events(build(), OneBuffer(), tmp_path, monkeypatch)
    assert len({float(each.double().sum()) for each in usual if each.is_floating_point()}) == 4
    assert all(torch.equal(a, b) for a, b in zip(usual, one, strict=True))


def test_a_plain_loop_may_reuse_its_memory():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    evolver = evolvenet.Evolver(model, None, evolvenet.Threshold(), torch.zeros(1, 6))
    buffer, gradient, written = torch.empty(16, 6), torch.empty(16, 2), []
    for _ in range(3):
        evolver.observe(buffer.normal_(), [gradient.normal_()])
        written.append((buffer.clone(), gradient.clone()))
    kept = evolver.state_dict()
    for (batch, gradient), (wanted, wanted_gradient) in zip(
        zip(kept["batches"], kept["gradients"], strict=True), written, strict=True
    ):
        assert torch.equal(batch, wanted)
        assert torch.equal(gradient[0], wanted_gradient)
