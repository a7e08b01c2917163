"""The modules of a run as Lightning's `ModelSummary` lists them, with parameters and widths before and after."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelSummary
from torch import nn
from torch.nn.parameter import is_lazy

from evolvenet._compat.lightning import summary_depth

log = logging.getLogger("evolvenet")

Sizes = Mapping[str, tuple[int, int]]
"""{name of a width: (its size before, its size after)}."""


@dataclass
class ModulesBefore:
    """The modules of a fit at its start; nothing where the trainer has no `ModelSummary`, which shows them then.

    Args:
        depth: how deep modules are listed: 1 for those of the LightningModule itself, -1 for all, 0 for none.
        parameters: {path: number of parameters}.
    """

    depth: int = 0
    parameters: dict[str, int] = field(default_factory=dict[str, int])

    @classmethod
    def of(cls, trainer: Trainer, module: nn.Module) -> ModulesBefore:
        """As deep as the trainer's `ModelSummary` shows them."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        depth = next((summary_depth(each) for each in callbacks if isinstance(each, ModelSummary)), 0)
        return cls(depth, parameters_of(module, depth))

    def announce(self, module: nn.Module, sizes: Sizes) -> None:
        """Log the table at level INFO, if there is a `ModelSummary`, and a width has changed.

        Args:
            module: as it is now.
            sizes: of the widths, by their names in the module.
        """
        if self.depth and any(before != after for before, after in sizes.values()):
            log.info("modules before → after:\n%s", modules_table(self.parameters, module, self.depth, sizes))


def parameters_of(module: nn.Module, depth: int) -> dict[str, int]:
    """{path: number of parameters} of the modules inside of one; 0 for parameters whose shape is not known yet.

    >>> parameters_of(nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 1))), depth=1)
    {'0': 9, '1': 4}
    """
    return {
        path: sum(0 if is_lazy(each) else each.numel() for each in inner.parameters())
        for path, inner in module.named_modules()
        if path and depth and (depth < 0 or path.count(".") < depth)
    }


def modules_table(before: Mapping[str, int], module: nn.Module, depth: int, sizes: Sizes) -> str:
    """Modules, their types, parameters and widths as text. Of several widths in one module it has the sum of their units.

    Args:
        before: from `parameters_of`.
        module: as it is now.
        depth: as for `parameters_of`.
        sizes: of the widths, by their names in the module.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> print(modules_table({"0": 80, "1": 0, "2": 34}, net, 1, {"0": (16, 8)}))
        Type     parameters   widths
    ────────────────────────────────
    0   Linear      80 → 40   16 → 8
    1   ReLU              0
    2   Linear      34 → 18
    """
    # rich and its tables take as long to import as the rest of this module.
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading, side in (("", "left"), ("Type", "left"), ("parameters", "right"), ("widths", "right")):
        table.add_column(heading, justify="right" if side == "right" else "left", no_wrap=True)
    types = {path: type(each).__name__ for path, each in module.named_modules()}
    now = parameters_of(module, depth)
    for path in [*now, *(path for path in before if path not in now)]:
        inside = [each for name, each in sizes.items() if f"{name}.".startswith(f"{path}.")]
        widths = _change(sum(first for first, _ in inside), sum(last for _, last in inside)) if inside else ""
        several = f" in {len(inside)}" if len(inside) > 1 else ""
        row = path, types.get(path, "gone"), _change(before.get(path, 0), now.get(path, 0)), widths + several
        # As text: rich would parse brackets in a plain string as styles.
        table.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), color_system=None, width=10_000)  # lines are as long as their content
    with console.capture() as capture:
        console.print(table)
    return "\n".join(each.rstrip() for each in capture.get().strip("\n").splitlines())


def _change(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} → {after:,}"
