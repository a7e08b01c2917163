"""The commands and their options; each calls what computes it, and prints it as a table or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console, Group
from rich.text import Text

from evolvenet.cli.errors import CommandError
from evolvenet.errors import EvolveNetError

app = typer.Typer(
    name="evolvenet",
    help="How wide should each layer of a network be, and of what rank?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Factory = Annotated[str, typer.Argument(help="The network: package.module:factory or folder/file.py:factory.")]
Arguments = Annotated[list[str], typer.Option("--arg", help="Of the factory: value or name=value. May be repeated.")]
Inputs = Annotated[
    list[str],
    typer.Option("--input", help="Shape, with type and bound: 1,3,224,224 or 1,128:int64:32000. One for each input."),
]
Checkpoint = Annotated[Path | None, typer.Option(help="Weights to load into it first.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Data = Annotated[
    str | None, typer.Option(help="Samples: a .npy, .npz, .pt or .safetensors file, or module:name of batches.")
]
Samples = Annotated[int, typer.Option(help="Most samples that are taken.", min=1)]
BatchSize = Annotated[int, typer.Option(help="Samples of a batch.", min=1)]
Scale = Annotated[float | None, typer.Option(help="Multiply the samples of a file by this.")]
Key = Annotated[str | None, typer.Option(help="Name of the samples in a file with several arrays.")]


@app.command()
def inspect(  # noqa: PLR0913  the options of the command
    context: typer.Context,
    factory: Factory,
    arg: Arguments = [],  # noqa: B006  typer copies it
    input: Inputs = [],  # noqa: B006
    checkpoint: Checkpoint = None,
    data: Data = None,
    heads: Annotated[
        bool | None,
        typer.Option(help="Whole heads of attentions, or places in them; by default what the model allows."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="List every width.")] = False,
    as_json: AsJson = False,
    samples: Samples = 256,
    batch_size: BatchSize = 64,
    scale: Scale = None,
    key: Key = None,
) -> None:
    """Show the widths of a network, why some are frozen, and their spectra."""
    from evolvenet.cli.inputs import batches
    from evolvenet.cli.inspection import inspection, inspection_table

    _only_with_data(context, data)
    model, inputs = _network(factory, arg, input, checkpoint, data, key)
    chosen = data and batches(data, inputs, samples=samples, size=batch_size, scale=scale, key=key)
    found = inspection(model, inputs, chosen or None, heads)
    _show(found, as_json, lambda: inspection_table(found, 0 if everything else 30))


@app.command()
def compress(  # noqa: PLR0913  the options of the command
    factory: Factory,
    data: Annotated[str, typer.Option(help="Samples without labels: a file or module:name of batches, see inspect.")],
    out: Annotated[Path, typer.Option(help="File to write: .pt, .safetensors or .ckpt.")],
    arg: Arguments = [],  # noqa: B006
    input: Inputs = [],  # noqa: B006
    checkpoint: Checkpoint = None,
    parameters: Annotated[str | None, typer.Option(help="Most parameters: 25% or 400k. One limit is given.")] = None,
    macs: Annotated[str | None, typer.Option(help="Most multiply-accumulates: 50% or 30M.")] = None,
    bytes: Annotated[str | None, typer.Option(help="Most bytes of weights: 25% or 4MB.")] = None,
    latency: Annotated[str | None, typer.Option(help="Longest forward pass here: 50% or 3ms.")] = None,
    lowrank: Annotated[bool, typer.Option(help="Whether layers may be factorized.")] = True,
    multiple: Annotated[int, typer.Option(help="Of which the units of a width that is cut are a multiple.", min=1)] = 1,
    fixed: Annotated[list[str], typer.Option(help="Pattern of widths that keep their size. May be repeated.")] = [],  # noqa: B006
    steps: Annotated[int, typer.Option(help="Steps of training towards the uncut network's outputs.", min=0)] = 0,
    as_json: AsJson = False,
    samples: Samples = 1024,
    batch_size: BatchSize = 64,
    scale: Scale = None,
    key: Key = None,
) -> None:
    """Make a network small enough for a limit, from a few unlabelled samples, and write it to a file."""
    from evolvenet.cli.compression import compressed, goal
    from evolvenet.cli.inputs import batches

    wanted = goal({"parameters": parameters, "macs": macs, "bytes": bytes, "latency": latency}, out)
    model, inputs = _network(factory, arg, input, checkpoint, data, key)
    chosen = batches(data, inputs, samples=samples, size=batch_size, scale=scale, key=key)
    done = compressed(model, inputs, chosen, wanted, out, lowrank=lowrank, multiple=multiple, fixed=fixed, steps=steps)
    _show(done.data, as_json, lambda: Group(done.table, Text(f"written: {out}")))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Folder of a run of train.py.")], as_json: AsJson = False) -> None:
    """Write a run's report.html anew, and print its summary."""
    from evolvenet.cli.run_report import rewritten

    found = rewritten(run)
    _show(found.data, as_json, lambda: found.table)


@app.command()
def diff(
    one: Annotated[Path, typer.Argument(help="A file of weights, or a folder of save_pretrained.")],
    two: Annotated[Path, typer.Argument(help="Another.")],
    as_json: AsJson = False,
) -> None:
    """Compare the widths and parameters of two files."""
    from evolvenet.cli.difference import difference, difference_table

    found = difference(one, two)
    _show(found, as_json, lambda: difference_table(found, one, two))


@app.command()
def front(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs or sweeps.")],
    picture: Annotated[
        Path | None, typer.Option(help="Draw accuracy against parameters: a .png, .svg or .pdf file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the networks of several runs by size and accuracy, and mark those that no other one beats."""
    from evolvenet.cli.outputs import check_file
    from evolvenet.cli.runs import points_of, points_table

    if picture is not None:
        check_file("--picture", picture, (".png", ".svg", ".pdf"))
    points = points_of(folders)
    if picture is not None:
        from evolvenet.report.front import draw_front

        draw_front(points).savefig(picture, dpi=140)
    _show(points, as_json, lambda: points_table(points))


def _only_with_data(context: typer.Context, data: str | None) -> None:
    """Refuse options about samples where there are none."""
    sources = {name: context.get_parameter_source(name) for name in ("samples", "batch_size", "scale", "key")}
    typed = [
        f"--{name.replace('_', '-')}"
        for name, source in sources.items()
        if getattr(source, "name", "") == "COMMANDLINE"
    ]
    if typed and data is None:
        raise CommandError(
            f"inspect: expected --data with {', '.join(typed)}, got none. Without it, spectra are of the weights."
        )


def _network(
    factory: str, arguments: list[str], given: list[str], checkpoint: Path | None, data: str | None, key: str | None
) -> tuple[Any, Any]:
    from evolvenet.cli.inputs import example_inputs
    from evolvenet.cli.objects import build
    from evolvenet.engine.saving import load

    # What a factory draws is the same at every call of the command.
    torch.manual_seed(0)
    model = build(factory, arguments).eval()
    inputs = example_inputs(model, given, data, key)
    if checkpoint is not None:
        load(model, checkpoint, example_inputs=inputs)
    return model, inputs


def _show(found: Any, as_json: bool, table: Callable[[], Any]) -> None:
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        Console().print(table())


def _line(error: Exception) -> str:
    if isinstance(error, EvolveNetError) or not isinstance(error, OSError) or not error.strerror:
        return str(error)
    if isinstance(error, FileNotFoundError):
        return f"there is no file {error.filename}"
    return f"{error.filename or 'a file'}: {error.strerror}"


def main() -> None:
    """Run the command; an error of the user's is one line."""
    try:
        app()
    except (EvolveNetError, OSError) as error:
        print(f"error: {' '.join(_line(error).split())}", file=sys.stderr)
        sys.exit(1)


__all__ = ["CommandError", "app", "main"]
