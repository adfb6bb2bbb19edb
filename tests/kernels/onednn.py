"""Marker of tests that need oneDNN, which torch's wheels contain but own builds may lack."""

import pytest

from cat_fast.kernels.linear.op import unavailable_reason

_REASON = unavailable_reason()
needs_onednn = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
