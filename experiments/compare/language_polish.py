"""Language models cut by several methods, then polished alike, without labels: `python -m experiments.compare.language_polish`.

The networks, the text, the samples and the cuts are those of `experiments.compare.language`; `evolvenet.polish` follows each cut.
Each result is one small JSON file, so a run can be stopped and resumed. The page `experiments/compare/language_polish.md` is
written from those files.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import evolvenet
from evolvenet.pruning.allocation import Allocation
from experiments.compare import language_peers as peers
from experiments.compare.copies import copied
from experiments.compare.language_methods import METHODS as CUTS
from experiments.compare.language_methods import Study
from experiments.compare.language_networks import FULL, KINDS, SMALL, TINY, Text, Uncut, add_sizes, mean_loss, windows
from experiments.compare.language_polish_table import LABELS, write_page
from experiments.compare.records import is_current, load
from experiments.pages import commit, state, write_whole

LEVELS = (50, 30, 20)
"""Percent of the parameters that are removed."""

POLISH: Mapping[str, Any] = {"steps": 2000, "rate": 3e-3, "batch_size": 32, "loss": "kl"}
"""Arguments of `evolvenet.polish`, the same after every cut."""

WRITTEN = 40
"""For each sequence of the text so many that the uncut network writes."""

PROMPT = 16
"""Characters of a sequence of the text that a written one begins with."""


@dataclass(frozen=True, eq=False)
class Polished(Study):
    """A trained network with what `polish` is run on.

    Args:
        written: for each sequence of the text so many that the network writes.
        settings: arguments of `polish`.
    """

    written: int = WRITTEN
    settings: Mapping[str, Any] | None = None

    @cached_property
    def allocation(self) -> Allocation:
        """Of all widths, by the divergence of what is predicted."""
        target = round(0.9 * self.graph.parameters)
        return evolvenet.allocate(self.uncut.model, self.graph, target, self.batches, loss="kl")

    @cached_property
    def samples(self) -> list[dict[str, Tensor]]:
        """The sequences that the cuts see, seven eighths; those that the network writes; the last eighth, by which is decided."""
        given = torch.cat([batch["input_ids"] for batch in self.batches])
        apart = len(given) - len(given) // 8
        torch.manual_seed(self.uncut.seed)
        more = [written(self.uncut.model, given[:apart]) for _ in range(self.written)]
        return [{"input_ids": part} for part in torch.cat([given[:apart], *more, given[apart:]]).split(32)]

    def polish(self, model: nn.Module) -> evolvenet.Polish:
        """Train a cut network towards the uncut one, in place."""
        settings = POLISH if self.settings is None else self.settings
        return evolvenet.polish(
            model, self.uncut.model, self.samples, outputs="logits", seed=self.uncut.seed, **settings
        )


@torch.no_grad()
def written(model: Any, sequences: Tensor) -> Tensor:
    """Sequences that begin as the given ones and go on as the network's probabilities have it, of the same shape."""
    start = sequences[:, :PROMPT]
    return model.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=sequences.shape[1] - start.shape[1],
        do_sample=True,
        top_k=0,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
    )


def both(study: Study, model: nn.Module, target: int) -> tuple[nn.Module, str]:
    """`evolvenet.compress`, by the divergence of what is predicted."""
    report = evolvenet.compress(
        peers.with_dense_layers(model),
        study.uncut.example,
        study.batches,
        parameters=target,
        outputs="logits",
        loss="kl",
    )
    return model, str(report)


METHODS = {name: both if name == "both" else CUTS[name].cut for name in LABELS}
"""Ways to cut."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the page."""
    options = _options(arguments)
    # Once, at the start: the sources may change during the run, which uses the modules loaded then.
    made_of = {"state": state(), "commit": commit()}
    setting = TINY if options.tiny else SMALL if options.small else replace(FULL, steps=options.steps)
    text = Text.read(options.text or options.cache / "text.txt")
    for kind in options.only:
        for seed in options.seeds if options.seeds is not None else setting.seeds:
            folder = options.cache / kind / f"seed{seed}"
            uncut = Uncut.of(kind, seed, text, setting, folder, "cpu")
            study = Polished(uncut, settings={**POLISH, "steps": options.polish_steps})
            for record in run(study, folder, options, made_of):
                print(kind, f"seed {seed}", json.dumps(record), flush=True)
    write_page(options.page, options.cache, "--tiny" if options.tiny else "--small" if options.small else "")
    print(f"page: {options.page}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.compare.language_polish", description=__doc__)
    add_sizes(parser, KINDS)
    parser.add_argument("--levels", nargs="+", type=int, choices=LEVELS, default=LEVELS, help="percent removed")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    parser.add_argument("--steps", type=int, default=FULL.steps, help="of the training of an uncut network")
    parser.add_argument(
        "--polish-steps", type=int, default=POLISH["steps"], help="of each polish (default %(default)s)"
    )
    parser.add_argument(
        "--text", type=Path, help="file of the text (default: text.txt in the cache, made if not there)"
    )
    parser.add_argument("--tiny", action="store_true", help="networks of two layers trained for some steps, for trials")
    parser.add_argument("--small", action="store_true", help="networks of two layers, `SMALL`, trained for 1,000 steps")
    parser.add_argument("--keep-old", action="store_true", help="keep results of an older state of the package")
    parser.add_argument("--cache", type=Path, default=Path("outputs/language_polish"), help="folder of the results")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="page to write")
    return parser.parse_args(arguments)


def run(
    study: Polished, folder: Path, options: argparse.Namespace, made_of: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Yield each missing result of one trained network as soon as it is saved."""
    uncut = study.uncut
    for level in options.levels:
        for name in options.methods:
            path, own = folder / f"{level}-{name}.json", {"weights": uncut.record["weights"], **made_of}
            asked = {**(study.settings or POLISH), "written": study.written}
            if not (_asked(path, asked) and is_current(path, own, keep_old=options.keep_old, after=None)):
                target = round((1 - level / 100) * uncut.record["parameters"])
                found = {"level": level, "method": name, "asked": asked, **own, **measured(study, name, target)}
                write_whole(path, json.dumps(found, indent=1))
                yield found


def _asked(path: Path, asked: Mapping[str, Any]) -> bool:
    """Whether a result is of the polish that is asked for."""
    return path.exists() and load(path).get("asked") == asked


def measured(study: Polished, name: str, target: int) -> dict[str, Any]:
    """One network cut and polished, measured after each; or why that failed. Seconds are processor time.

    Args:
        study: of the uncut network.
        name: of the method.
        target: number of parameters after the cut.
    """
    uncut = study.uncut
    samples = study.samples
    torch.manual_seed(uncut.seed)
    begin = time.process_time()
    try:
        model, _ = METHODS[name](study, copied(uncut.model), target)
    except (evolvenet.EvolveNetError, ValueError) as error:
        return {"refused": str(error)}
    model.eval()
    middle = time.process_time()
    cut = _rises(uncut, model)
    start = time.process_time()
    done = study.polish(model)
    end = time.process_time()
    return {
        "parameters": peers.parameters(model) / uncut.record["parameters"],
        "cut": cut,
        "polished": _rises(uncut, model),
        "seconds_to_cut": round(middle - begin, 1),
        "seconds_to_polish": round(end - start, 1),
        "samples": sum(len(batch["input_ids"]) for batch in samples),
        **{f"polish_{key}": value for key, value in vars(done).items()},
    }


def _rises(uncut: Uncut, model: nn.Module) -> dict[str, float]:
    """By how much the loss is above that of the uncut network."""
    return {
        part: mean_loss(model, windows(getattr(uncut.text, part), uncut.setting.context, uncut.setting.judged))
        - uncut.record[part]
        for part in ("validation", "test")
    }


if __name__ == "__main__":
    main()
