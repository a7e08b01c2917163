"""A pretend accelerator on the CPU: finds code that would fail on a real one, or make the host wait for it.

Importing it registers a device "pretend" with torch, before the first backward pass of the process: autograd starts a thread
for each device then. Its memory is host memory and its kernels are the CPU's, so results
are the CPU's to the last bit, but it goes wrong where a GPU goes wrong:
- an op on tensors of "pretend" and "cpu" raises (but for 0-dim CPU tensors, CPU indices, lengths of packed sequences);
- a CPU generator for a device op raises, and the device's random numbers are a stream of their own;
- every wait of the host is reported with its line of code: `.item()`, `.cpu()`, `torch.tensor(1.0, device=…)`, masks, eigh …;
- `.numpy()` of a device tensor raises, and so does float64 after `pretend_device.float64(False)`, as on MPS.
Not covered: kernels, streams, the allocator, autocast's casts, sparse tensors, and code behind `tensor.is_cuda`, which is false.

    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 2)).to("pretend")
    with pretend_device.watch("mypackage") as seen:  # the innermost frame of that package is named; None: of any but torch
        model(torch.randn(8, 2, device="pretend")).sum().item()
    print(seen.count("sync"), seen.table())  # 1  "1 ×  sync  _local_scalar_dense  file.py:12 (function)"

Lightning: `Trainer(strategy=pretend_device.strategy())`. Needs g++ and ninja once (half a minute); torch 2.8 … 2.13.
"""

from __future__ import annotations

import fcntl
import os
import re
import sys
import types
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.backend_registration import generate_methods_for_privateuse1_backend, rename_privateuse1_backend
from torch.utils.cpp_extension import get_default_build_root, load_inline

SOURCE = Path(__file__).with_name("pretend_device.cpp").read_text("utf-8")


def _built() -> Any:
    """The compiled kernels, from torch's cache of extensions where they are there already."""
    # ninja may be installed beside this Python alone.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    name = "evolvenet_pretend_device_" + re.sub(r"\W", "_", torch.__version__)
    folder = Path(get_default_build_root(), f"python{sys.version_info.major}{sys.version_info.minor}", name)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "one_at_a_time").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # torch's own lock is a file that a killed process leaves behind, and then everybody waits for good.
        (folder / "lock").unlink(missing_ok=True)
        return load_inline(name, SOURCE, extra_cflags=["-O1"], build_directory=str(folder))


_in_use = False
"""Whether torch is told that there is an accelerator: libraries take it by themselves then, and pin memory for it."""


def in_use(value: bool) -> None:
    """Say whether the device is there. Tensors can be made on it either way."""
    global _in_use
    _in_use = value


_native: Any = _built()
rename_privateuse1_backend("pretend")
_module: Any = types.ModuleType("torch.pretend")
_module.is_initialized = lambda: True
_module.is_available = lambda: _in_use
_module._is_in_bad_fork, _module.device_count, _module.current_device = lambda: False, lambda: 1, lambda: 0
_module.set_device = _module.synchronize = _module.empty_cache = _module._lazy_init = lambda *unused: None
_module.device, _module.get_amp_supported_dtype = nullcontext, lambda: [torch.bfloat16, torch.float16]
_module.manual_seed = _module.manual_seed_all = lambda seed: _native.standard().manual_seed(seed)
_module.get_rng_state = lambda device=None: _native.standard().get_state()
_module.set_rng_state = lambda state, device=None: _native.standard().set_state(state)
torch._register_device_module("pretend", _module)
generate_methods_for_privateuse1_backend()
float64 = _native.doubles


def _lstm_cell(inputs: Any, hidden: Any, cell: Any, one: Any = None, two: Any = None) -> Any:
    gates: Any = sum((bias for bias in (one, two) if bias is not None), inputs + hidden)
    i, f, c, o = (part.tanh() if k == 2 else part.sigmoid() for k, part in enumerate(gates.chunk(4, 1)))
    after = f * cell + i * c
    return o * after.tanh(), after, torch.cat([i, f, c, o], 1)


def _lstm_cell_backward(dh: Any, dc: Any, before: Any, after: Any, workspace: Any, biased: bool) -> Any:
    (i, f, c, o), t = workspace.chunk(4, 1), after.tanh()
    dh, dc = (torch.zeros_like(after) if each is None else each for each in (dh, dc))
    d = dc + dh * o * (1 - t * t)
    gates = torch.cat([d * c * i * (1 - i), d * before * f * (1 - f), d * i * (1 - c * c), dh * t * o * (1 - o)], 1)
    return gates, d * f, gates.sum(0) if biased else None


def _gru_cell(inputs: Any, hidden: Any, before: Any, one: Any = None, two: Any = None) -> Any:
    inputs, hidden = inputs if one is None else inputs + one, hidden if two is None else hidden + two
    (ir, iz, i), (hr, hz, h) = inputs.chunk(3, 1), hidden.chunk(3, 1)
    r, z = (ir + hr).sigmoid(), (iz + hz).sigmoid()
    n = (i + r * h).tanh()
    return n + z * (before - n), torch.cat([r, z, n, before, h], 1)


def _gru_cell_backward(dh: Any, workspace: Any, biased: bool) -> Any:
    r, z, n, before, h = workspace.chunk(5, 1)
    di = dh * (1 - z) * (1 - n * n)
    shared = [di * h * r * (1 - r), dh * (before - n) * z * (1 - z)]
    inputs, hidden = torch.cat([*shared, di], 1), torch.cat([*shared, di * r], 1)
    return inputs, hidden, dh * z, inputs.sum(0) if biased else None, hidden.sum(0) if biased else None


_library = torch.library.Library("aten", "IMPL")  # what torch's own LSTM takes on a device without cuDNN
_library.impl("_thnn_fused_lstm_cell", _lstm_cell, "PrivateUse1")
_library.impl("_thnn_fused_lstm_cell_backward_impl", _lstm_cell_backward, "PrivateUse1")
_library.impl("_thnn_fused_gru_cell", _gru_cell, "PrivateUse1")
_library.impl("_thnn_fused_gru_cell_backward", _gru_cell_backward, "PrivateUse1")


class Seen:
    """(kind, op, where) → how often. Kinds: "sync", the host waits; "async", a copy that may take its time; "mixed" devices."""

    def __init__(self, package: str | None) -> None:
        self.package, self.found = package, Counter()

    def __call__(self, kind: str, op: str) -> None:
        frame, where = sys._getframe(1), "elsewhere"
        while frame is not None and where == "elsewhere":
            path = frame.f_code.co_filename
            if f"{os.sep}{self.package}{os.sep}" in path if self.package else f"{os.sep}torch{os.sep}" not in path:
                where = f"{path.rpartition(os.sep)[2]}:{frame.f_lineno} ({frame.f_code.co_name})"
            frame = frame.f_back
        self.found[kind, op, where] += 1

    def count(self, kind: str, where: str = "") -> int:
        """How many of a kind, at places that hold the text `where`; ".py" leaves out what is "elsewhere"."""
        return sum(times for (each, _, at), times in self.found.items() if each == kind and where in at)

    def table(self) -> str:
        """A line for each place, the most frequent first."""
        return "\n".join(f"{times:6d} ×  {kind:6s} {op:24s} {at}" for (kind, op, at), times in self.found.most_common())


@contextmanager
def watch(package: str | None = None) -> Any:
    """Count what the host waits for while the body runs."""
    _native.watch(seen := Seen(package))
    try:
        yield seen
    finally:
        _native.watch(None)


def strategy() -> Any:
    """For `lightning.Trainer(strategy=…)`."""
    from lightning.pytorch.accelerators import Accelerator
    from lightning.pytorch.strategies import SingleDeviceStrategy

    answers = {
        "parse_devices": [0],
        "get_parallel_devices": [torch.device("pretend", 0)],
        "auto_device_count": 1,
        "is_available": True,
        "name": "pretend",
        "setup_device": None,
        "get_device_stats": {},
        "teardown": None,
    }
    made = {name: staticmethod(lambda *unused, value=value: value) for name, value in answers.items()}
    return SingleDeviceStrategy(torch.device("pretend", 0), accelerator=type("Pretend", (Accelerator,), made)())
