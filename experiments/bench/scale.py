"""Tracing and pruning of language models of growing size: `python -m experiments.bench.scale`, or `make bench-scale`.

Each model is a LLaMA of the transformers library with random weights. `prune` takes a quarter of the inner units of every
block, fitted on batches of random words: what a fit costs does not depend on the words. Every stage runs in a fresh process
of one thread; memory is the most that it had resident, and what that is above a process that has only built the model.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import evolvenet
from experiments.pages import commit, machine_line, markdown, write_whole

SIZES: dict[str, dict[str, Any]] = {
    "150M": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 2048, "num_attention_heads": 12},
    "400M": {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 2816, "num_attention_heads": 16},
    "1.3B": {"hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 5504, "num_attention_heads": 16},
    "7B": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "num_attention_heads": 32},
}
HALF = ("1.3B",)
"""Those whose weights are in bfloat16."""
STAGES = ("build", "trace", "trace without weights", "prune")
WITHOUT_WEIGHTS = ("7B",)
"""Those that are only traced, on the device "meta"."""
SEQUENCES, WORDS = 4, 128
BATCHES = {"1.3B": 3}
"""Batches that `prune` is given, of which one is held out; 8 where there is no other number."""
VOCABULARY = 32_000
GOALS = {("150M", "trace"): 10, ("150M", "prune"): 30}
"""{(model, stage): CPU seconds that it was to take at most}."""
SHARE = 0.75
"""Of the inner units of each block, that stay."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every stage of every size and write the table."""
    options = _options(arguments)
    if options.child:
        return _child(*options.child)
    known = json.loads(options.results.read_text("utf-8")) if options.results.exists() else {}
    for size in options.sizes or SIZES:
        for stage in STAGES if size not in WITHOUT_WEIGHTS else ("trace without weights",):
            if options.stages and stage not in options.stages:
                continue
            command = [sys.executable, "-m", "experiments.bench.scale", "--child", size, stage]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            known.setdefault(size, {})[stage] = {**json.loads(done.stdout.splitlines()[-1]), "commit": commit()}
            print(size, stage, known[size][stage], flush=True)
            write_whole(options.results, json.dumps(known))
            write_whole(options.table, _page(known))
    return None


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.scale", description=__doc__)
    parser.add_argument("sizes", nargs="*", help=f"without any {', '.join(SIZES)}")
    parser.add_argument("--stages", nargs="*", choices=STAGES, help="all by default")
    parser.add_argument("--table", type=Path, default=Path(__file__).with_suffix(".md"), help="page to write")
    parser.add_argument("--results", type=Path, default=Path("outputs/bench-scale.json"), help="figures so far")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _child(size: str, stage: str) -> None:
    # Over 40 lines: one measurement of each stage, read from top to bottom.
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES[size], vocab_size=VOCABULARY)

    def built(device: str) -> Any:
        torch.set_default_dtype(torch.bfloat16 if size in HALF else torch.float32)
        try:
            with torch.device(device):
                return transformers.LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)

    example = {"input_ids": torch.randint(0, VOCABULARY, (1, 16))}
    without = built("meta")
    model = without if stage == "trace without weights" else built("cpu")
    run: Callable[[], Any]
    if stage == "prune":
        # Traced without weights, so that the memory is that of pruning.
        graph = evolvenet.trace(without, example, outputs="logits")
        sizes = {width.name: int(SHARE * width.size) // 8 * 8 for width in graph.resizable if ".mlp." in width.name}
        count = BATCHES.get(size, 8)
        batches = [{"input_ids": torch.randint(0, VOCABULARY, (SEQUENCES, WORDS))} for _ in range(count)]

        def run() -> Any:
            return evolvenet.prune(model, graph, sizes, batches=batches)
    elif stage == "build":

        def run() -> Any:
            return None
    else:

        def run() -> Any:
            return evolvenet.trace(model, example, outputs="logits")

    wall, cpu = time.perf_counter(), time.process_time()
    after = run()
    found = {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "parameters": sum(parameter.numel() for parameter in without.parameters()),
        "weights": sum(parameter.numel() * parameter.element_size() for parameter in without.parameters()) / 2**30,
        "after": None if after is None else after.parameters,
    }
    print(json.dumps(found))


def _row(size: str, stage: str, each: dict[str, Any], base: float | None) -> list[str]:
    """A line of the table; `base` is what the model alone takes."""
    above = None if base is None or stage == "trace without weights" else each["gib"] - base
    return [
        size,
        stage,
        f"{each['parameters'] / 1e6:,.0f} M",
        "bfloat16" if size in HALF else "float32",
        f"{each['weights']:.2f}",
        f"{BATCHES.get(size, 8)}" if stage == "prune" else "–",
        f"{each['cpu']:.0f}",
        "–" if each["wall"] is None else f"{each['wall']:.0f}",
        f"{each['gib']:.2f}",
        "–" if above is None else f"{above:.2f}",
        "–" if above is None else f"{above / each['weights']:.2f}",
        each.get("commit", "–"),
    ]


def _page(known: dict[str, dict[str, dict[str, Any]]]) -> str:
    rows = [
        _row(size, stage, known[size][stage], known[size].get("build", {}).get("gib"))
        for size in SIZES
        for stage in STAGES
        if stage != "build" and stage in known.get(size, {})
    ]
    head = [
        "model", "stage", "parameters", "type", "weights, GiB", "batches", "CPU s", "wall s", "most resident, GiB",
        "above the model, GiB", "of the weights", "at",
    ]  # fmt: skip
    missing = [
        f"{size} {stage}"
        for size in SIZES
        for stage in (STAGES[1:] if size not in WITHOUT_WEIGHTS else ("trace without weights",))
        if stage not in known.get(size, {})
    ]
    paragraphs = (
        f"`prune` takes the inner units of every block from 100 to {SHARE:.0%}, fitted on batches of {SEQUENCES} × {WORDS} "
        "random words, of which one is held out. The moments of one width at a time are in memory, and the outputs that "
        "consumers are fitted to. A model has random weights.",
        _larger(known),
        f"Not measured: {', '.join(missing) or 'nothing'}. CPU seconds are what the process computed; wall seconds are "
        "longer where other processes had the cores as well.",
    )
    command = (
        "`make bench-scale` (`python -m experiments.bench.scale`) writes this page; with `SIZE --stages STAGE` one line of it.",
        *_goals(known),
    )
    head_notes = textwrap.fill(" ".join(command), 130, break_on_hyphens=False)
    notes = "\n\n".join(textwrap.fill(each, 130, break_on_hyphens=False) for each in paragraphs)
    table = "\n".join(markdown(head, rows, text=(0, 1, 3, 11)))
    top = f"# Language models of growing size\n\n{head_notes}\n\n{machine_line()}, one thread."
    return f"{top}\n\n{table}\n\n{notes}\n"


def _goals(known: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """A sentence for each goal whose stage was measured."""
    found = []
    for (size, stage), most in GOALS.items():
        if stage in known.get(size, {}):
            seconds = known[size][stage]["cpu"]
            found.append(
                f"{stage} of {size}: goal {most} CPU s, now {seconds:.0f}{'' if seconds <= most else ' (missed)'}."
            )
    return found


def _larger(known: dict[str, dict[str, dict[str, Any]]], size: str = "7B") -> str:
    """What follows for a size that is not measured, by arithmetic from the largest one that is."""
    shape = SIZES[size]
    inner, blocks, stream = shape["intermediate_size"], shape["num_hidden_layers"], shape["hidden_size"]
    words = 8 * SEQUENCES * WORDS
    moments, gib = 2 * inner**2 * 8, 2**30
    text = (
        f"What follows for {size} (by arithmetic): the moments of a width of {inner:,} units, in two halves and double "
        f"precision, take {moments / gib:.1f} GiB (those of all widths {blocks * moments / gib:.0f} GiB), the outputs of "
        f"{words:,} words in {blocks} blocks {words * stream * blocks * 4 / gib:.1f} GiB in float32."
    )
    measured = [each for each in SIZES if "prune" in known.get(each, {})]
    if not measured:
        return text
    last = measured[-1]
    hours = (
        known[last]["prune"]["cpu"] * _multiplications(size, 8) / _multiplications(last, BATCHES.get(last, 8)) / 3600
    )
    return (
        f"{text} By the number of multiplications (two runs of the words, a Gram matrix of each width and of what is kept "
        f"of it, two factorizations): {hours:.1f} CPU hours, from the seconds of {last}."
    )


def _multiplications(size: str, batches: int) -> float:
    shape = SIZES[size]
    inner, blocks, stream = shape["intermediate_size"], shape["num_hidden_layers"], shape["hidden_size"]
    words, kept = batches * SEQUENCES * WORDS, SHARE * inner
    run = words * blocks * (4 * stream**2 + 3 * stream * inner)
    fit = words * (inner**2 + kept**2) / 2 + (inner**3 + 4 * kept**3) / 3 + 3 * kept**2 * stream
    return 2 * run + blocks * fit


if __name__ == "__main__":
    main()
