"""Name and vendor of the processor."""

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
"""Description of the processor on Linux."""


def processor_name() -> str:
    """Return the model of the first core on Linux; elsewhere `platform.processor()` or the architecture."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def is_amd() -> bool:
    """Return True for processors by AMD."""
    return "AuthenticAMD" in (_cpuinfo("vendor_id") or platform.processor())


def _cpuinfo(field: str) -> str | None:
    """Return a field of the first core, or None where `CPUINFO` is missing or does not have it."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), None)
