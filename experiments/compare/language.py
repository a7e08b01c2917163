"""Language models made smaller, beside peers: `python -m experiments.compare.language`, or `make compare-language`.

Character models of the transformers library, LLaMA and GPT-2, are trained on Python's documentation and licences. Each result
is one small JSON file, the trained networks lie beside them, so a run can be stopped and resumed, and several can run at once on
different networks. The page `experiments/compare/language.md` is written from those files.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import evolvenet
from experiments.compare.language_methods import METHODS, Method, Study, result
from experiments.compare.language_networks import (
    FULL,
    KINDS,
    TINY,
    Text,
    Uncut,
    add_sizes,
    fit,
    mean_loss,
    windows,
)
from experiments.compare.language_peers import parameters
from experiments.compare.language_table import write_page
from experiments.compare.records import is_current
from experiments.pages import commit, state, write_whole

LEVELS = (50, 30, 20, 10)
"""Percent of the parameters that are removed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the page."""
    options = _options(arguments)
    # Once, at the start: the sources may change during the run, which uses the modules loaded then.
    options.made_of = {"state": state(), "commit": options.commit or commit()}
    setting = TINY if options.tiny else FULL
    text = Text.read(options.text or options.cache / "text.txt", options.device)
    for kind in options.only:
        for seed in options.seeds if options.seeds is not None else setting.seeds:
            folder = options.cache / kind / f"seed{seed}"
            study = Study(Uncut.of(kind, seed, text, setting, folder, options.device))
            for record in run(study, folder, options):
                print(_line(kind, seed, record), flush=True)
    write_page(options.page, options.cache)
    print(f"page: {options.page}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.compare.language", description=__doc__)
    add_sizes(parser, KINDS)
    parser.add_argument("--levels", nargs="+", type=int, choices=LEVELS, default=LEVELS, help="percent removed")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    parser.add_argument("--device", default="cpu", help="of training, cuts and measurements")
    parser.add_argument(
        "--text", type=Path, help="file of the text (default: text.txt in the cache, made if not there)"
    )
    parser.add_argument("--one-shot", action="store_true", help="leave out the training steps after the cut")
    parser.add_argument("--tiny", action="store_true", help="networks of two layers trained for some steps, for trials")
    parser.add_argument("--commit", help="of the sources, to be recorded where they lie in no checkout")
    parser.add_argument("--keep-old", action="store_true", help="keep results of an older state of the package")
    parser.add_argument("--cache", type=Path, default=Path("outputs/compare_language"), help="folder of the results")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="page to write")
    return parser.parse_args(arguments)


def run(study: Study, folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield each missing result of one trained network as soon as it is saved."""
    uncut = study.uncut
    for name in options.methods:
        for level in options.levels:
            method, path = METHODS[name], folder / f"{level}-{name}.json"
            made_of = {"weights": uncut.record["weights"], **(options.made_of if method.ours else {})}
            if is_current(path, made_of, keep_old=options.keep_old, after=None if options.one_shot else "after"):
                continue
            target = round((1 - level / 100) * uncut.record["parameters"])
            found = {"level": level, "method": name, **made_of, **measured(study, method, target, not options.one_shot)}
            write_whole(path, json.dumps(found, indent=1))
            yield found


def measured(study: Study, method: Method, target: int, steps: bool) -> dict[str, Any]:
    """One network made smaller and measured; or why that failed, which does not end the other rows."""
    uncut, setting = study.uncut, study.uncut.setting
    torch.manual_seed(uncut.seed)
    begin = time.perf_counter()
    try:
        model, report = result(study, method, target)
    except (evolvenet.EvolveNetError, ValueError) as error:
        return {"refused": str(error)}
    found: dict[str, Any] = {"seconds": round(time.perf_counter() - begin, 1), "report": report}
    found |= {"parameters": parameters(model) / uncut.record["parameters"]}
    parts = {
        part: windows(getattr(uncut.text, part), setting.context, setting.judged) for part in ("validation", "test")
    }
    found |= {part: mean_loss(model, sequences) - uncut.record[part] for part, sequences in parts.items()}
    if steps:
        fit(model, uncut.text, setting, uncut.seed + 100, setting.steps_after, setting.rate_after)
        found |= {"after": mean_loss(model, parts["test"]) - uncut.record["test"]}
    return found


def _line(kind: str, seed: int, record: dict[str, Any]) -> str:
    head = f"{kind} seed {seed} −{record['level']} % {record['method']}: "
    if "refused" in record:
        return head + record["refused"]
    after = f", after steps {record['after']:+.4f}" if "after" in record else ""
    return head + (
        f"loss {record['validation']:+.4f} on validation, {record['test']:+.4f} on test text{after}, "
        f"{record['parameters']:.1%} of the parameters, {record['seconds']} s"
    )


if __name__ == "__main__":
    main()
