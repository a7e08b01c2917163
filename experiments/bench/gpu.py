"""What the callback costs on a CUDA card: `make bench-gpu`, or `python -m experiments.bench.gpu --out FOLDER`.

Each network is trained without the callback and with it. A variant that fails becomes a row with its error, and its
traceback goes to the log; the others run on. Needs torch, torchvision, lightning and transformers, no network.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from experiments.bench.gpu_networks import SMALL_SUBJECTS, SUBJECTS
from experiments.bench.gpu_run import EVERY, VARIANTS, measure
from experiments.bench.time_limit import OutOfTimeError, limited
from experiments.pages import commit, machine_line, markdown, write_whole

GIB = 2**30
PER = 1000
"""Training steps to which an event is compared: one event in so many."""

EXPLANATION = f"""\
- **step**: forward, backward, AdamW, without the callback; **with**: a step with the callback when no event is due;
  **recording**: while the batches for an event are kept (at most {EVERY}). Medians, in ms.
- **trace**: what the callback does after the first batch, once in a run: tracing, trials, the comparison of numbers.
- **measured**: an event whose policy takes the statistics of all widths and changes nothing. **cut**: an event that
  removes a tenth of the units of every width that was measured. Seconds, and both in training steps.
- **of {PER:,} steps**: the event with the cut as a share of {PER:,} training steps: what it costs at one event in so many.
- **after**: the first step after the cut; with torch.compile it compiles anew.
- **memory**: the most GiB allocated on the card in a step, in the trace and in the event with the cut."""
HEAD = [
    "network", "variant", "step", "with", "recording", "trace, s", "measured, s", "cut, s", "measured, steps", "cut, steps",
    f"of {PER:,} steps", "after, s", "memory: step", "trace", "cut", "parameters", "remarks",
]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every network in every variant, and write the page after each."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _options(given)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("Expected a CUDA card, got none that torch can use. For a try on the CPU: --device cpu --quick.")
    options.out.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(options.out / "gpu.log", mode="w", encoding="utf-8")
    log = logging.getLogger("evolvenet")
    log.addHandler(handler)
    trainers = logging.getLogger("lightning.pytorch")
    level = trainers.level
    trainers.setLevel(logging.WARNING)
    ends, rows = time.monotonic() + options.limit, list[dict[str, Any]]()
    subjects = SMALL_SUBJECTS if options.quick else SUBJECTS
    try:
        for variant in options.variants:
            for name in options.only:
                log.info("--- %s, %s", name, variant)
                backend = "eager" if options.quick else "inductor"
                run = partial(measure, subjects[name], VARIANTS[variant], device, backend)
                rows.append({"network": name, "variant": variant, **_guarded(run, ends - time.monotonic(), log)})
                print(" | ".join(row_of(rows[-1])), flush=True)
                _write(options, given, rows)
    finally:
        trainers.setLevel(level)
        log.removeHandler(handler)
        handler.close()
    failed = sum("error" in row for row in rows)
    print(f"{failed} of {len(rows)} variants failed, see {options.out / 'gpu.log'}")
    print(f"page: {options.out / 'gpu.md'}")


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.gpu", description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(SUBJECTS), default=list(SUBJECTS), help="networks")
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("outputs/bench-gpu"), help="folder (default %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small networks, nothing compiled: for a try")
    parser.add_argument("--limit", type=float, default=180, help="seconds for everything (default %(default)s)")
    parser.add_argument("--commit", default="", help="of the code, where this is no checkout")
    return parser.parse_args(arguments)


def _guarded(run: Any, seconds: float, log: logging.Logger) -> dict[str, Any]:
    """What a measurement returns, or its error; and how long it took."""
    began = time.monotonic()
    try:
        if seconds < 1:
            return {"error": "not run: the time limit is over", "wall": 0.0}
        with limited(seconds, OutOfTimeError):
            found = run()
    except (Exception, OutOfTimeError) as problem:  # noqa: BLE001  whatever it raises is a result
        log.error("%s", traceback.format_exc())
        first = str(problem).strip().partition("\n")[0]
        found = {"error": f"{type(problem).__name__}: {first}"}
    return {**found, "wall": time.monotonic() - began}


def row_of(row: dict[str, Any]) -> list[str]:
    """The cells of a measurement, or of its error."""
    head, rest = [row["network"], row["variant"]], [""] * (len(HEAD) - 3)
    if "error" in row:
        return [*head, *rest, _plain(row["error"])]
    seconds, peaks = row["seconds"], row["peaks"]
    plain = _middle(seconds, "step without the callback")
    measured, cut = _middle(seconds, "event without a change"), _middle(seconds, "event with a change")
    return [
        *head,
        *(_number(_middle(seconds, what), 1000, 1) for what in ("step without the callback", "step", "step while recording")),
        *(_number(value, 1, 2) for value in (_middle(seconds, "trace"), measured, cut)),
        *(_number(value and plain and value / plain, 1, 1) for value in (measured, cut)),
        _number(cut and plain and cut / plain / PER, 100, 2, " %"),
        _number(seconds.get("step after an event", [None])[-1], 1, 2),
        *(_number(max(peaks.get(what, [0])) / GIB or None, 1, 2) for what in ("step", "trace", "event with a change")),
        " → ".join(f"{count:,}" for count in _parameters(row["events"])),
        _plain(_remarks(row)),
    ]  # fmt: skip


def _middle(seconds: dict[str, list[float]], what: str) -> float | None:
    return median(seconds[what]) if seconds.get(what) else None


def _number(value: float | None, factor: float, digits: int, unit: str = "") -> str:
    return "" if value is None else f"{factor * value:.{digits}f}{unit}"


def _parameters(events: list[dict[str, Any]]) -> list[int]:
    return [events[0]["before"], events[-1]["after"]] if events else []


def _remarks(row: dict[str, Any]) -> str:
    """How many widths there are, how many batches were measured on, and what did not happen."""
    skipped = [f"the event was skipped: {event['skipped']}" for event in row["events"] if event["skipped"]]
    changes = sum(event["changes"] for event in row["events"])
    found = [
        f"{changes} of {row['widths']} widths cut, {len(row['frozen'])} frozen, {row['batches']} batches measured on"
    ]
    return "; ".join([*found, *skipped])


def _plain(text: str) -> str:
    return text.partition("\n")[0][:200].replace("|", "\\|")


def _write(options: argparse.Namespace, given: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """The page, and the same as data with every single time, peak and reason."""
    card = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU ({platform.machine()})"
    about = {
        "card": card,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "commit": options.commit or commit(),
        "command": " ".join(["python -m experiments.bench.gpu", *map(shlex.quote, given)]),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
    }
    lines = [
        "# What the callback costs on a card",
        "",
        f"{card}, at {about['commit']}, {machine_line()}: `{about['command']}`. Products of float32 matrices: "
        f"{about['float32_matmul_precision']}; TF32 in convolutions: {about['cudnn_allow_tf32']}.",
        "",
        EXPLANATION,
        "",
        *markdown(HEAD, list(map(row_of, rows)), text=(0, 1, len(HEAD) - 1)),
    ]
    write_whole(options.out / "gpu.md", "\n".join(lines) + "\n")
    write_whole(options.out / "gpu.json", json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
