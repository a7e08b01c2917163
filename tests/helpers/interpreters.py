"""Scripts run in a fresh interpreter, to test what happens at import, with a made-up torchvision on its path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BROKEN = """
print("run")
from . import part
import torch
runs = globals().get("runs", 0) + 1
torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: dets)
torch.library.register_fake("torchvision::qnms")(lambda dets, scores, iou_threshold: dets)
class Image: pass
"""
MATCHING = """
print("run")
import torch
library = torch.library.Library("torchvision", "FRAGMENT")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
class Image: pass
"""


def run_script(script: str, package: Path | None = None) -> list[str]:
    """The lines that a fresh interpreter prints; `package` is a folder that comes first on its path."""
    path = os.pathsep.join(str(part) for part in (package, os.environ.get("PYTHONPATH")) if part)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


def fake_torchvision(folder: Path, source: str) -> Path:
    """A package called torchvision, with one submodule `part`."""
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(source)
    (folder / "torchvision" / "part.py").write_text('print("part")')
    return folder
