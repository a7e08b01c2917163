"""The table of modules at the end of a fit: there with Lightning's `ModelSummary`, as deep, with what this fit has changed."""

import logging

import pytest
from lightning.pytorch.callbacks import ModelSummary

from evolvenet import WidthEvolution
from tests.helpers.policies import Walk
from tests.helpers.runs import Batches, fresh, trainer


def evolution():
    """An event of 8 batches, whose widths are known."""
    return WidthEvolution(Walk((9, 12), (7, 12), (7, 12)), every_n_steps=4, calibration_batches=2, stop=1.0)


def fit(folder, callback, module, caplog, *callbacks):
    caplog.clear()
    caplog.set_level(logging.INFO, logger="evolvenet")
    trainer(folder, [callback, *callbacks], max_epochs=1).fit(module, Batches(8))
    return next((each.getMessage() for each in caplog.records if "modules before" in each.getMessage()), None)


def parameters(module):
    return sum(each.numel() for each in module.parameters())


@pytest.mark.parametrize("depth", [1, 2, 0, None])
def test_it_lists_modules_as_deep_as_the_summary_does(tmp_path, caplog, depth):
    module, callback = fresh(), evolution()
    first = parameters(module.net), parameters(module.net[0])
    text = fit(tmp_path, callback, module, caplog, *([] if depth is None else [ModelSummary(max_depth=depth)]))
    assert callback.history is not None
    assert callback.history.latest.sizes == {"net.0": 9, "net.4": 12}
    if not depth:
        assert text is None
        return
    assert text is not None
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines()[3:]}
    assert rows["net"] == f"Sequential {first[0]} → {parameters(module.net)} 32 → 21 in 2"
    if depth == 1:
        assert list(rows) == ["net"]
        return
    assert list(rows) == ["net", *(f"net.{place}" for place in range(7))]
    assert rows["net.0"] == f"Linear {first[1]} → {parameters(module.net[0])} 16 → 9"
    assert rows["net.2"] == "ReLU 0"


def test_a_second_fit_shows_what_has_changed_in_it_alone(tmp_path, caplog):
    module, callback = fresh(), evolution()
    fit(tmp_path, callback, module, caplog, ModelSummary())
    between = parameters(module)
    text = fit(tmp_path, callback, module, caplog, ModelSummary())
    assert text is not None
    assert text.splitlines()[3].split(maxsplit=2)[2].split() == f"{between} → {parameters(module)} 21 → 19 in 2".split()
    assert "modules before" not in (fit(tmp_path, callback, module, caplog, ModelSummary()) or "")
