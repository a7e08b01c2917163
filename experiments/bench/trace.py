"""What tracing and proving cost, in forward passes: `python -m experiments.bench.trace`, or `make bench-trace`.

Seconds are medians of rounds that take turns in one process; memory is measured in a fresh process each.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torchvision import models

import evolvenet
from experiments.bench.time_limit import limited
from experiments.pages import machine_line, markdown, write_whole

MODELS = ("resnet50", "densenet121", "vit_b_16", "swin_t", "convnext_tiny", "googlenet")
TRACE, VERIFICATION = (importlib.import_module(f"evolvenet.tracing.{name}") for name in ("trace", "verification"))
FORWARDS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every model and write the table."""
    options = _options(arguments)
    if options.child:
        return _child(options)
    rows = []
    for name in options.models or MODELS:
        row = {"model": name, **_in_child("speed", name, options)}
        for what in ("forward", "trace"):
            row[f"memory_{what}"] = _in_child(f"memory-{what}", name, options)
        rows.append(row)
        print(" | ".join(_row(row)), flush=True)
        _write(options, rows)
    print(f"table: {options.table}")
    return None


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.trace", description=__doc__)
    parser.add_argument("models", nargs="*", help=f"of torchvision; without any {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts (default %(default)s)")
    parser.add_argument("--peer-limit", type=float, default=180, help="seconds for Torch-Pruning (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default %(default)s)")
    parser.add_argument("--side", type=int, default=224, help="of the input image")
    parser.add_argument("--table", type=Path, default=Path(__file__).with_suffix(".md"), help="page to write")
    parser.add_argument("--child", choices=("speed", "memory-forward", "memory-trace"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _in_child(what: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    passed = ("rounds", "peer_limit", "threads", "side")
    flags = [flag for key in passed for flag in (f"--{key.replace('_', '-')}", str(getattr(options, key)))]
    command = [sys.executable, "-m", "experiments.bench.trace", name, "--child", what, *flags]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def _child(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    (name,) = options.models
    # Once with a tiny model, so that what is only imported on the first call counts nowhere.
    evolvenet.trace(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1)), torch.zeros(1, 1, 2, 2))
    if options.child == "speed":
        found: dict[str, Any] = _speed(name, options)
    else:
        found = _memory(name, options.child.removeprefix("memory-"), options.side)
    print(json.dumps(found))


def _build(name: str, side: int) -> tuple[nn.Module, torch.Tensor]:
    quick = {"init_weights": False} if name == "googlenet" else {}
    return models.get_model(name, weights=None, **quick).eval(), torch.randn(1, 3, side, side)


def _speed(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a forward pass, trace, trials, comparison of numbers, and Torch-Pruning (or what went wrong)."""
    model, image = _build(name, options.side)
    seconds: dict[str, list[float]] = {"forward": [], "trace": [], "proof": [], "numbers": [], "peer": []}
    trouble: str | None = None if importlib.util.find_spec("torch_pruning") else "not installed"
    _forward(model, image)
    for _ in range(options.rounds):
        seconds["forward"] += [_forward(model, image) for _ in range(FORWARDS)]
        for part, spent in _trace(model, image).items():
            seconds[part].append(spent)
        if trouble is None:
            try:
                with limited(options.peer_limit):
                    seconds["peer"].append(_peer(copy.deepcopy(model), image))
            except Exception as error:  # noqa: BLE001  whatever it raises is a result
                trouble = f"{type(error).__name__}: {error}"
    medians = {part: median(values) for part, values in seconds.items() if values}
    return {**medians, "trouble": trouble}


def _forward(model: nn.Module, image: torch.Tensor) -> float:
    begin = time.perf_counter()
    with torch.no_grad():
        model(image)
    return time.perf_counter() - begin


def _trace(model: nn.Module, image: torch.Tensor) -> dict[str, float]:
    """Seconds up to the first graph, of the trials that follow, and of the comparison of numbers."""
    spent = {"verify": 0.0, "build": 0.0, "numbers": 0.0}

    def timed(key: str, action: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begin, first = time.perf_counter(), spent[key] == 0.0
            result = action(*args, **kwargs)
            # The first one alone: a proof may start again, and builds more graphs as it goes.
            spent[key] += time.perf_counter() - begin if first else 0.0
            return result

        return run

    begin = time.perf_counter()
    verify, build = timed("verify", TRACE.verify), timed("build", VERIFICATION.build_graph)
    numbers = timed("numbers", TRACE.compare_numbers)
    with (
        patch.object(TRACE, "verify", verify),
        patch.object(VERIFICATION, "build_graph", build),
        patch.object(TRACE, "compare_numbers", numbers),
    ):
        evolvenet.trace(model, image)
    total = time.perf_counter() - begin
    proof = spent["verify"] - spent["build"]
    return {"trace": total - proof - spent["numbers"], "proof": proof, "numbers": spent["numbers"]}


def _peer(model: nn.Module, image: torch.Tensor) -> float:
    """Seconds that Torch-Pruning takes for its graph and one 30 % cut with the last layer kept."""
    pruning: Any = importlib.import_module("torch_pruning")
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    begin = time.perf_counter()
    importance = pruning.importance.MagnitudeImportance(p=2)
    pruner = pruning.pruner.MagnitudePruner(model, image, importance, pruning_ratio=0.3, ignored_layers=[last])
    pruner.step()
    return time.perf_counter() - begin


def _memory(name: str, what: str, side: int) -> dict[str, float]:
    """Megabytes of the model and its input, and how much more the peak of one forward pass or one trace is."""
    start = _resident("VmRSS")
    model, image = _build(name, side)
    built = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is forgotten
    if what == "forward":
        _forward(model, image)
    else:
        evolvenet.trace(model, image)
    return {"model": built - start, "more": _resident("VmHWM") - built}


def _resident(field: str) -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if field in line]
    return int(line.split()[1]) / 1024


HEAD = [
    "model", "forward, ms", "trace, ms", "proof, ms", "numbers, ms", "trace / forward", "proof / forward", "numbers / forward",
    "numbers / proof", "Torch-Pruning, ms", "all / Torch-Pruning", "model, MB", "forward, MB more", "trace, MB more",
    "memory / forward's",
]  # fmt: skip
EXPLANATION = """\
- **forward**: one pass of one image in eval mode without gradients.
  **trace**: labels in both modes and the first graph. Goal: ≤ 10 forward passes.
  **proof**: all trials of all widths. Goal: ≤ 40 forward passes more.
  **numbers**: the outputs of a copy in double precision, as it is and with its widths permuted and widened by zeros.
  Goal: ≤ the proof.
- **Torch-Pruning**: its dependency graph and one 30 % cut without hints, the last layer kept. Goal: all three within 3
  times it.
- **memory**: peak resident memory of a fresh process above that before the model was built, of tracing and proving as a
  ratio to a forward pass. Goal: ≤ 2."""


def _row(row: dict[str, Any]) -> list[str]:
    forward, trace, proof, numbers = (row[part] for part in ("forward", "trace", "proof", "numbers"))
    peak = {what: sum(row[f"memory_{what}"].values()) for what in ("forward", "trace")}
    peer = row.get("peer") if row["trouble"] is None else None
    return [
        row["model"],
        *(f"{1000 * seconds:.0f}" for seconds in (forward, trace, proof, numbers)),
        f"{trace / forward:.1f}",
        f"{proof / forward:.1f}",
        f"{numbers / forward:.1f}",
        f"{numbers / proof:.2f}",
        f"{1000 * peer:.0f}" if peer else str(row["trouble"])[:80].replace("|", "\\|"),
        f"{(trace + proof + numbers) / peer:.2f}" if peer else "",
        f"{row['memory_forward']['model']:.0f}",
        *(f"{row[f'memory_{what}']['more']:.0f}" for what in ("forward", "trace")),
        f"{peak['trace'] / peak['forward']:.2f}",
    ]


def _write(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    threads = f"{options.threads} thread{'s' if options.threads > 1 else ''}"
    lines = [
        "# What tracing and proving cost",
        "",
        f"Written by `make bench-trace` {machine_line()}. Medians of {options.rounds} rounds, {threads}, one image of "
        f"{options.side} × {options.side}.",
        "",
        EXPLANATION,
        "",
        *markdown(HEAD, list(map(_row, rows))),
    ]
    write_whole(options.table, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
