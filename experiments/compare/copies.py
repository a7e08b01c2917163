"""Networks as they are compared: copies, and fingerprints of their weights."""

from __future__ import annotations

import copy
import hashlib

from torch import nn


def fingerprint(model: nn.Module) -> str:
    """Twelve hex digits that change with any weight."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def copied(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode."""
    return copy.deepcopy(model).eval()
