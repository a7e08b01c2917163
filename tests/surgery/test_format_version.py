"""Files and states of older formats are read; those of newer ones are refused before anything changes."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import evolvenet
from evolvenet.errors import RecordError
from evolvenet.graph.format_version import FORMAT, FORMAT_KEY
from tests.helpers.runs import Batches, fresh, trainer

NEWER = FORMAT + 1
REFUSED = re.compile(rf"format {NEWER}: expected format {FORMAT} or older.*Install", re.DOTALL)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def narrow():
    model = mlp()
    evolvenet.prune(model, evolvenet.trace(model, torch.zeros(1, 6)), {"0": 5})
    return model


def rewritten(path, version):
    """A file of `evolvenet.save` as another version would have written it: None for one that knew no version."""

    def changed(record):
        kept = {name: value for name, value in record.items() if name != FORMAT_KEY}
        assert len(kept) == len(record) - 1
        return kept if version is None else {**kept, FORMAT_KEY: version}

    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        record = changed(json.loads(metadata["evolvenet"]))
        save_file(tensors, path, {**metadata, "evolvenet": json.dumps(record)})
        return path
    found = torch.load(path, weights_only=True)
    state = found.get("state_dict", found)
    for metadata in state._metadata.values():
        for key in ("evolvenet", "evolvenet.replacement"):
            if key in metadata:
                metadata[key] = changed(metadata[key])
    torch.save(found, path)
    return path


@pytest.mark.parametrize("ending", [".pt", ".ckpt", ".safetensors"])
def test_files_of_newer_formats_are_refused_and_older_ones_read(tmp_path, ending):
    model = narrow()
    evolvenet.save(model, tmp_path / f"a{ending}")
    older = evolvenet.load(mlp(), rewritten(tmp_path / f"a{ending}", None))
    assert older.get_submodule("0").out_features == 5
    evolvenet.save(model, tmp_path / f"a{ending}")
    target = mlp()
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(RecordError, match=REFUSED):
        evolvenet.load(target, rewritten(tmp_path / f"a{ending}", NEWER))
    assert target[0].out_features == 8
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


def test_factorized_files_of_newer_formats_are_refused_and_older_ones_read(tmp_path):
    model = mlp()
    evolvenet.factorize(model, {"0": 3})
    torch.save(model.state_dict(), tmp_path / "a.pt")
    older = evolvenet.load(mlp(), rewritten(tmp_path / "a.pt", None))
    assert older.get_submodule("0.0").out_features == 3
    torch.save(model.state_dict(), tmp_path / "a.pt")
    with pytest.raises(RecordError, match=REFUSED):
        evolvenet.load(mlp(), rewritten(tmp_path / "a.pt", NEWER))


@pytest.mark.parametrize("version", [NEWER, "1", None, True, -1])
def test_no_state_of_another_kind_of_format_is_read(version):
    evolver = evolvenet.Evolver(mlp(), None, evolvenet.Threshold(), torch.zeros(1, 6))
    state = evolver.state_dict()
    assert state[FORMAT_KEY] == FORMAT
    with pytest.raises(RecordError, match="expected format"):
        evolver.load_state_dict({**state, FORMAT_KEY: version})
    evolver.load_state_dict({name: value for name, value in state.items() if name != FORMAT_KEY})


def test_a_run_resumes_from_an_older_format_and_refuses_a_newer_one(tmp_path):
    def evolution():
        return evolvenet.WidthEvolution(evolvenet.Threshold(prune=0.5), every_n_steps=3, calibration_batches=1)

    first = trainer(tmp_path, [evolution()], max_epochs=1)
    first.fit(fresh(), Batches())
    first.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    (state,) = (entry for name, entry in saved["callbacks"].items() if name.startswith("WidthEvolution"))
    state["evolver"][FORMAT_KEY] = NEWER
    torch.save(saved, tmp_path / "newer.ckpt")
    with pytest.raises(RecordError, match=REFUSED):
        trainer(tmp_path, [evolution()], max_epochs=2).fit(fresh(), Batches(), ckpt_path=tmp_path / "newer.ckpt")
    del state["evolver"][FORMAT_KEY]
    torch.save(saved, tmp_path / "older.ckpt")
    trainer(tmp_path, [evolution()], max_epochs=2).fit(fresh(), Batches(), ckpt_path=tmp_path / "older.ckpt")
