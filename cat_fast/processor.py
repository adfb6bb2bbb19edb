"""The name of the processor, for reports of measurements."""

import platform
from pathlib import Path


def processor_name() -> str:
    """Return the model of the first core on Linux; elsewhere `platform.processor()` or the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
