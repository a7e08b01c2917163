"""`import evolvenet` makes torchvision and Lightning importable, imports neither, and changes nothing where both match.

What happens at import can only be seen in a fresh interpreter, so each test starts one. Most of them see a made-up
torchvision, so that their result does not depend on whether the real one matches torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.helpers.interpreters import BROKEN, MATCHING, fake_torchvision, run_script

OF_TORCHVISION = "[finder for finder in sys.meta_path if getattr(finder, 'module', None) == 'torchvision']"
SYMPTOM = "operator torchvision::nms does not exist"


def test_torchvision_and_lightning_import_in_this_environment() -> None:
    lines = run_script(
        "import sys, evolvenet, torchvision, lightning, torch\n"
        "torchvision.models.resnet18, torchvision.transforms.ToTensor, torch.ops.torchvision.nms\n"
        "print(issubclass(evolvenet.WidthEvolution, lightning.Callback))\n"
        f"print({OF_TORCHVISION})\n"
    )
    assert lines == ["True", "[]"]


def test_missing_operators_are_declared_and_the_import_done_again(tmp_path: Path) -> None:
    lines = run_script(
        "import sys, importlib.util, pickle, evolvenet\n"
        "assert importlib.util.find_spec('torchvision').origin.endswith('__init__.py')\n"
        "assert 'torchvision' not in sys.modules\n"
        "import torchvision, torch\n"
        "assert torch.ops.torchvision.nms and torch.ops.torchvision.qnms\n"
        "assert type(torchvision.__loader__).__name__ == 'SourceFileLoader'\n"
        "assert torchvision.__spec__.loader is torchvision.__loader__ and 'exec_module' not in vars(torchvision.__loader__)\n"
        "assert torchvision.runs == 1, 'the second run must not see the names of the first'\n"
        "assert pickle.loads(pickle.dumps(torchvision.Image)) is torchvision.Image\n"
        "import gc; gc.collect(); assert torch.ops.torchvision.nms\n",
        fake_torchvision(tmp_path, BROKEN),
    )
    assert lines == ["run", "part", "run", "part"], "the second run must not find the first one's submodules"


def test_an_import_that_failed_before_evolvenet_was_there_is_mended_too(tmp_path: Path) -> None:
    lines = run_script(
        "try:\n import torchvision\nexcept RuntimeError as error:\n print(error)\n"
        "import evolvenet, torchvision\nprint(torchvision.Image.__name__)\n",
        fake_torchvision(tmp_path, BROKEN),
    )
    assert lines[2] == SYMPTOM
    assert lines[-1] == "Image"


def test_threads_that_import_at_once_all_get_it(tmp_path: Path) -> None:
    lines = run_script(
        "import evolvenet\nfrom concurrent.futures import ThreadPoolExecutor as Pool\n"
        "def load(_):\n import torchvision\n return torchvision.Image\n"
        "with Pool(4) as pool:\n print(len(set(pool.map(load, range(4)))))\n",
        fake_torchvision(tmp_path, BROKEN),
    )
    assert lines == ["run", "part", "run", "part", "1"]


def test_a_matching_torchvision_is_left_alone(tmp_path: Path) -> None:
    lines = run_script(
        "import sys, evolvenet\nfrom evolvenet._compat import torchvision as compat\ncompat.mend_torchvision()\n"
        f"assert len({OF_TORCHVISION}) == 1, 'a second call adds nothing'\n"
        "import torchvision, torch\n"
        f"assert {OF_TORCHVISION} == [] and not compat._libraries\n"
        "assert not hasattr(torch.ops.torchvision, 'qnms')\n",
        fake_torchvision(tmp_path, MATCHING),
    )
    assert lines == ["run"]


@pytest.mark.parametrize(
    "error", ["RuntimeError('operator torchvision::roi_align does not exist')", "ImportError('libcudart.so.13')"]
)
def test_another_error_of_torchvision_passes_through(tmp_path: Path, error: str) -> None:
    lines = run_script(
        "import sys, evolvenet\n"
        "for _ in range(2):\n"
        " try:\n  import torchvision\n"
        " except Exception as error:\n  print(repr(error), 'torchvision' in sys.modules)\n"
        "from evolvenet._compat.torchvision import _libraries\nprint(_libraries)\n",
        fake_torchvision(tmp_path, f"print('run')\nraise {error}\n"),
    )
    seen = error.replace('"', "'")
    assert lines == ["run", f"{seen} False"] * 2 + ["[]"]


def test_without_torchvision_or_with_it_imported_nothing_happens() -> None:
    lines = run_script(
        "import sys, types, importlib, importlib.util\n"
        "import evolvenet\n"
        "from evolvenet._compat.torchvision import mend_torchvision\n"
        "sys.path[:] = []\n"
        "print(importlib.util.find_spec('torchvision'))\n"
        "try:\n import torchvision\n"
        "except ModuleNotFoundError as error:\n print(error)\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'evolvenet._compat' not in str(type(f))]\n"
        "sys.modules['torchvision'] = types.ModuleType('torchvision')\n"
        "before = list(sys.meta_path)\n"
        "mend_torchvision()\n"
        "print(sys.meta_path == before)\n"
    )
    assert lines == ["None", "No module named 'torchvision'", "True"]


def test_importing_takes_few_modules_and_leaves_lightning_alone() -> None:
    """Beyond torch it takes EvolveNet's own modules and a few small ones; nothing that is imported late comes along."""
    script = (
        "import sys, torch\nbefore = set(sys.modules)\nimport evolvenet\n"
        "print('\\n'.join(name for name in set(sys.modules) - before if name.partition('.')[0] != 'evolvenet'))\n"
    )
    imported = sorted(run_script(script))
    assert {name.partition(".")[0] for name in imported} <= {"torch", "numpy", *sys.stdlib_module_names}
    assert len(imported) <= 20, imported
