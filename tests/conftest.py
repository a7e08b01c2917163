"""What every test starts from: EvolveNet imported first (its mend precedes torchvision), one thread, a seed."""

import evolvenet  # noqa: F401  isort: skip

import pytest
import torch
from hypothesis import settings

# Other work on the machine must not fail a property test, and a failure must come back on the next run.
settings.register_profile("evolvenet", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("evolvenet")
torch.set_num_threads(1)

# Whatever imports it registers a device, once in a process.
collect_ignore = ["helpers/pretend_device.py"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start each test from the same random state."""
    torch.manual_seed(0)
