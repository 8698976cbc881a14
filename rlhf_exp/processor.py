"""Which processor this is, as Linux says."""

from __future__ import annotations

from pathlib import Path

INTEL = "GenuineIntel"


def vendor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's maker, such as AuthenticAMD; "" where nobody says."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return ""
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id"))
    return next(found, "")
