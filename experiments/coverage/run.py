"""Which models can be traced, pruned and grown: `python -m experiments.coverage.run`, or `make coverage` for all of them.

Every model runs in a process of its own with limits on time and memory, forked from one that has imported the libraries.
Its results are kept in one small JSON file, so a run can be stopped and resumed; the table
`experiments/coverage/coverage.md` is written from those files after every model.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import multiprocessing
import os
import resource
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from experiments.coverage.checks import check_ours, check_torch_pruning
from experiments.coverage.family_checks import check_family
from experiments.coverage.subjects import subjects
from experiments.coverage.table import OURS, PEER, write_table
from experiments.pages import state, versions, write_whole

CHECKS = {OURS: check_ours, PEER: check_torch_pruning}
IMPORTED = ("experiments.coverage.checks", "torch._dynamo", "timm", "transformers")
"""What every process needs, imported once; those that are not installed are left out."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the table."""
    options = _options(arguments)
    names = [name for name in subjects() if any(fnmatch.fnmatch(name, pattern) for pattern in options.models or ["*"])]
    if not names:
        raise SystemExit(f"No model of the table is called {' or '.join(options.models)}; try 'torchvision/*'.")
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(IMPORTED))
    table = threading.Lock()

    def run(number: int, name: str, part: str) -> None:
        record = _record_path(options.cache, name, part)
        if not _is_current(record, part, options):
            print(f"{number:3}/{len(names)} {name} ({part})", flush=True)
            _run_child(name, part, record, options)
            with table:
                _write(options)

    with ThreadPoolExecutor(options.workers) as pool:
        jobs = [
            pool.submit(run, number, name, part)
            for number, name in enumerate(names, start=1)
            for part in _parts(options)
        ]
        for job in jobs:
            job.result()
    _write(options)
    print(f"table: {options.table}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.coverage.run", description=__doc__)
    parser.add_argument("models", nargs="*", help="names or patterns, 'torchvision/*'; all without any")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one model (default %(default)s)")
    parser.add_argument("--peer-limit", type=float, default=120, help="the same for Torch-Pruning")
    parser.add_argument("--memory", type=float, default=14, help="GB of address space for one model")
    parser.add_argument("--threads", type=int, default=1, help="of one model's process")
    parser.add_argument("--cache", type=Path, default=Path("outputs/coverage"), help="folder of the JSON files")
    parser.add_argument("--table", type=Path, default=Path(__file__).with_name("coverage.md"), help="page to write")
    parser.add_argument("--keep-old", action="store_true", help="keep results of an older state of the package")
    parser.add_argument("--only", choices=tuple(CHECKS), help="leave the other one's results as they are")
    parser.add_argument("--workers", type=int, default=1, help="models at a time (default %(default)s)")
    return parser.parse_args(arguments)


def _parts(options: argparse.Namespace) -> list[str]:
    parts = [options.only] if options.only else list(CHECKS)
    return [part for part in parts if part == OURS or importlib.util.find_spec("torch_pruning") is not None]


def _record_path(cache: Path, name: str, part: str) -> Path:
    return cache / part / f"{name}.json"


def _is_current(record: Path, part: str, options: argparse.Namespace) -> bool:
    """Whether a complete result exists within the limits and, for our part, for the present code."""
    if not record.exists():
        return False
    found = json.loads(record.read_text(encoding="utf-8"))
    if "wall_seconds" not in found:
        return False
    limit = options.limit if part == OURS else options.peer_limit
    same_limit = found["stopped"] is None or found["limit"] >= limit
    same_code = options.keep_old or part == PEER or found["state"] == state()
    return same_limit and same_code


def _run_child(name: str, part: str, record: Path, options: argparse.Namespace) -> None:
    """Run one model in a process of its own; if a limit or a crash stopped it, its record says so."""
    limit = options.limit if part == OURS else options.peer_limit
    begin, stopped = time.perf_counter(), None
    _save(record, _fresh_record(name, part))
    process = multiprocessing.get_context("forkserver").Process(
        target=_child, args=(name, part, record, options.threads, options.memory)
    )
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        stopped = f"time limit of {limit:.0f} s"
    elif process.exitcode:
        code = process.exitcode
        stopped = f"the process ended with {f'signal {-code}' if code < 0 else f'status {code}'}"
    found = json.loads(record.read_text(encoding="utf-8"))
    wall = round(time.perf_counter() - begin, 1)
    _save(record, {**found, "stopped": stopped, "limit": limit, "wall_seconds": wall})


def _fresh_record(name: str, part: str) -> dict[str, Any]:
    return {"name": name, "part": part, "state": state(), "versions": versions(), "stages": {}}


def _child(name: str, part: str, record: Path, threads: int, memory: float) -> None:
    """Run one model in this process, its output in a file beside the record."""
    with record.with_suffix(".log").open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(threads)
    limit = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    found = _fresh_record(name, part)

    def note(stage: str, figures: Mapping[str, Any]) -> None:
        found["stages"][stage] = dict(figures)
        _save(record, found)

    subject = subjects()[name]
    check = check_family if part == OURS and subject.family is not None else CHECKS[part]
    check(subject, note)


def _save(record: Path, found: Mapping[str, Any]) -> None:
    write_whole(record, json.dumps(found, indent=1))


def _write(options: argparse.Namespace) -> None:
    records = {}
    for name in subjects():
        for part in CHECKS:
            path = _record_path(options.cache, name, part)
            if path.exists():
                found = json.loads(path.read_text(encoding="utf-8"))
                if "wall_seconds" in found:
                    records[name, part] = found
    limits = {OURS: options.limit, PEER: options.peer_limit}
    write_table(options.table, list(subjects()), records, limits, options.memory, state())


if __name__ == "__main__":
    main()
