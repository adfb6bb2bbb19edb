"""The name of the processor, which reports of measurements state."""

import platform
from pathlib import Path


def processor_name() -> str:
    """The model that Linux gives the first core; elsewhere what Python knows, or the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
