"""Fingerprint of a model: a hash of its settings and weights."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def fingerprint(settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """Return 16 hex digits that identify settings, as JSON, and weights, as float32."""
    digest = hashlib.sha256(json.dumps(dict(settings), default=list, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
