"""From a trained network to a small one with few images and no labels: `python -m experiments.compare.few_samples --data DIR`.

Or `make compare-few-samples`. Each result is one small JSON file, so a run can be stopped and resumed, and several can run at
once on different seeds or data sets. The page `experiments/compare/few_samples.md` is written from those files.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import convert_conv2d_weight_memory_format

import evolvenet
from experiments.compare import peers
from experiments.compare.copies import copied
from experiments.compare.few_samples_table import write_page
from experiments.compare.networks import TaskData, reestimate, tasks, uncut
from experiments.compare.records import is_current
from experiments.pages import add_data, commit, state, write_whole

IMAGES = 1024
"""In the table by size; the curve by number of images has fewer."""

PARTS = 8
"""Batches that the images are in: EvolveNet's cut is fitted on all but the last one, with which `polish` decides."""

SEARCHED = 256
"""Images that `compress` is fitted on, at most: its six attempts on all would take more than the time that there is."""

BATCHES = 4
"""That these are in."""


@dataclass(frozen=True)
class Setting:
    """What is run on a data set.

    Args:
        removed: percent of the parameters.
        curve: percent of the parameters that are removed with fewer images, too.
        fewer: how many of them.
        shift: largest shift of the images that are polished on, pixels.
        flip: whether half of them are mirrored.
        polish: arguments of `evolvenet.polish`.
        by_size: {percent removed: further ones}.
        ranked: the same where ranks were cut, too.
        half: whether the networks run in bfloat16 while they are polished (autocast), channels last in memory.
    """

    removed: tuple[float, ...]
    curve: float
    fewer: tuple[int, ...]
    shift: int
    flip: bool
    polish: dict[str, Any]
    by_size: Mapping[float, dict[str, Any]] = field(default_factory=dict)
    ranked: Mapping[float, dict[str, Any]] = field(default_factory=dict)
    half: bool = False


SETTINGS = {
    "mnist": Setting(
        (90, 95, 97.5),
        95,
        (50, 100, 250, 500),
        1,
        False,
        {"steps": 400, "features": ("blocks.1", "blocks.3", "blocks.5", "hidden")},
    ),
    "cifar10": Setting(
        (50, 70, 90),
        90,
        (50, 100, 250, 500),
        3,
        True,
        {"features": ("blocks.0", "blocks.2", "blocks.4", "hidden")},
        {
            50: {"steps": 400, "rate": 2e-3},
            70: {"steps": 500, "rate": 3e-3},
            90: {"steps": 800},
        },
        {
            50: {"steps": 100, "rate": 1e-3},
            70: {"steps": 200, "rate": 2e-3},
            90: {"steps": 300, "rate": 5e-3},
        },
        half=True,
    ),
    "digits": Setting(
        (50,),
        50,
        (50,),
        1,
        False,
        {"steps": 20, "features": ("blocks.*", "hidden")},
        {50: {"rate": 5e-3}},
        half=True,
    ),
}
"""Imitated beside the outputs: the last residual sum of each stage, and the features before the last layer."""


@dataclass(frozen=True)
class Case:
    """A network to be cut.

    Args:
        data: the task with its data.
        model: a copy of the uncut network, changed in place.
        images: those that are given, in `PARTS` batches.
        target: number of parameters after the cut.
    """

    data: TaskData
    model: nn.Module
    images: list[Tensor]
    target: int


def widths(case: Case) -> None:
    """EvolveNet's widths."""
    known = case.images[:-1]
    graph = evolvenet.trace(case.model, case.data.example)
    sizes = evolvenet.allocate(case.model, graph, parameters=case.target, batches=known)
    evolvenet.prune(case.model, graph, sizes, batches=known)


def both(case: Case) -> None:
    """EvolveNet's widths and ranks."""
    images = torch.cat(case.images[:-1])[:SEARCHED]
    batches = images.split(-(-len(images) // BATCHES))
    evolvenet.compress(case.model, case.data.example, batches, parameters=case.target)


def torch_pruning(case: Case) -> None:
    """Torch-Pruning's units by their L2 norms over the whole network, then BatchNorm's statistics anew on all images."""
    graph = evolvenet.trace(case.model, case.data.example)
    kept = peers.torch_pruning_global(case.model, graph, case.data.example, "l2", case.target)
    evolvenet.resize(case.model, graph, kept)
    reestimate(case.model, [torch.cat(case.images)])


@dataclass(frozen=True)
class Method:
    """A way to cut, the module without which it is left out, and whether ranks are cut, too."""

    cut: Callable[[Case], None]
    needs: str = "torch"
    ranks: bool = False


METHODS = {
    "widths": Method(widths),
    "both": Method(both, ranks=True),
    "l2": Method(torch_pruning, "torch_pruning"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the page."""
    options = _options(arguments)
    # Once, at the start: the sources may change during the run, which uses the modules loaded then.
    options.made_of = {"state": state(), "commit": commit()}
    torch.set_num_threads(1)
    for name in options.only or [name for name, task in tasks().items() if task.default]:
        data = TaskData.open(tasks()[name], options.data)
        for seed in options.seeds:
            for record in run(data, seed, options):
                print(_line(name, seed, record), flush=True)
    write_page(options.page, options.cache)
    print(f"page: {options.page}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.compare.few_samples", description=__doc__)
    add_data(parser)
    parser.add_argument("--only", nargs="+", choices=tuple(SETTINGS), help="data sets (default: mnist cifar10)")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), help="of the networks (default: 0 1 2)")
    parser.add_argument(
        "--removed", nargs="+", type=float, help="percent of the parameters (default: each data set's own)"
    )
    parser.add_argument("--images", nargs="+", type=int, help="how many (default: 1024, and fewer for one size)")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    parser.add_argument("--keep-old", action="store_true", help="keep results of an older state of the package")
    parser.add_argument(
        "--cache", type=Path, default=Path("outputs/compare_few_samples"), help="folder of the JSON files"
    )
    parser.add_argument("--trained", type=Path, help="folder of the trained networks (default: the cache)")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="page to write")
    return parser.parse_args(arguments)


def run(data: TaskData, seed: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield each missing result of one trained network as soon as it is saved."""
    setting, place = SETTINGS[data.task.name], Path(data.task.name) / f"seed{seed}"
    folder = options.cache / place
    model, trained = uncut(data, seed, (options.trained or options.cache) / place)
    write_whole(folder / "uncut.json", json.dumps(trained, indent=1))
    pairs = [(removed, IMAGES) for removed in setting.removed] + [(setting.curve, count) for count in setting.fewer]
    for removed, count in pairs:
        if removed not in (options.removed or [removed]) or count not in (options.images or [count]):
            continue
        for name in options.methods:
            path, made_of = (
                folder / f"{removed:g}-{count}-{name}.json",
                {"weights": trained["weights"], **options.made_of},
            )
            if importlib.util.find_spec(METHODS[name].needs) is None or is_current(
                path, made_of, keep_old=options.keep_old, after=None
            ):
                continue
            found = {"removed": removed, "images": count, "method": name, **made_of}
            found |= measured(data, seed, model, METHODS[name], count, removed)
            write_whole(path, json.dumps(found, indent=1))
            yield found


def measured(data: TaskData, seed: int, whole: nn.Module, method: Method, count: int, removed: float) -> dict[str, Any]:
    """Cut and polish a copy of a network, and measure after each; seconds are those of one thread's processor time.

    Args:
        data: the task with its data.
        seed: of the images that are given, of their order, and of how they are changed.
        whole: the uncut network.
        method: of the cut.
        count: images that are given.
        removed: percent of the parameters.
    """
    setting = SETTINGS[data.task.name]
    torch.manual_seed(seed)
    images = list(torch.cat(data.calibration(seed, count)).split(-(-count // PARTS)))
    target = round((1 - removed / 100) * sum(parameter.numel() for parameter in whole.parameters()))
    case = Case(data, copied(whole), images, target)
    begin = time.process_time()
    method.cut(case)
    middle = time.process_time()
    cut = data.accuracy(case.model)
    start = time.process_time()
    further = (setting.ranked if method.ranks else setting.by_size).get(removed, {})
    done = polished(case.model, whole, images, setting, further)
    end = time.process_time()
    return {
        "parameters": sum(parameter.numel() for parameter in case.model.parameters()),
        "cut": cut,
        "seconds_to_cut": round(middle - begin, 1),
        "polished": data.accuracy(case.model),
        "seconds_to_polish": round(end - start, 1),
        **{f"polish_{name}": value for name, value in vars(done).items()},
    }


def polished(
    model: nn.Module, whole: nn.Module, images: Sequence[Tensor], setting: Setting, further: Mapping[str, Any]
) -> evolvenet.Polish:
    """Polish a network that was cut, in place.

    Args:
        model: the network.
        whole: the uncut one.
        images: those that are given.
        setting: of the data set.
        further: arguments of `evolvenet.polish` beside those of the data set.
    """

    def changed(inputs: Tensor) -> Tensor:
        return moved(inputs, setting.shift, setting.flip)

    chosen = {**setting.polish, **further}
    if not setting.half:
        return evolvenet.polish(model, whole, images, augment=changed, **chosen)
    whole = convert_conv2d_weight_memory_format(copied(whole), torch.channels_last)
    convert_conv2d_weight_memory_format(model, torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        done = evolvenet.polish(model, whole, images, augment=changed, **chosen)
    convert_conv2d_weight_memory_format(model, torch.contiguous_format)
    return done


def moved(images: Tensor, shift: int, flip: bool) -> Tensor:
    """Images each shifted by whole pixels, its border repeated, half of them mirrored left to right.

    >>> moved(torch.arange(16.0).reshape(1, 1, 4, 4), 1, True).shape
    torch.Size([1, 1, 4, 4])
    """
    count, _, height, width = images.shape
    if flip:
        images = torch.where(torch.rand(count, 1, 1, 1) < 0.5, images, images.flip(-1))
    if not shift:
        return images
    padded = functional.pad(images, (shift,) * 4, mode="replicate")
    rows, columns = (torch.randint(2 * shift + 1, (count, 1)) + torch.arange(size) for size in (height, width))
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _line(task: str, seed: int, record: dict[str, Any]) -> str:
    return (
        f"{task} seed {seed} −{record['removed']:g} % {record['images']} images {record['method']}: "
        f"{record['parameters']:,} parameters, cut {record['cut']:.2%} in {record['seconds_to_cut']} s, "
        f"polished {record['polished']:.2%} in {record['seconds_to_polish']} s"
    )


if __name__ == "__main__":
    main()
