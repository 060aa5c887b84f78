"""Where and when something was measured."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import jax

_PACKAGES = (
    "jax",
    "jaxlib",
    "numpy",
    "optax",
    "torch",
    "entmax",
    "tokamax",
    "scikit-learn",
    "scipy",
    "netcal",
    "relplot",
    "libtpu",
    "jax-cuda12-plugin",
    "nvidia-cuda-nvcc-cu12",
)


class Environment:
    """The machine, the versions, the date and the load, as rows of a table."""

    def __init__(self):
        self.rows = {
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "device": _device(),
            "processor": f"{_processor()}, {_cores()} cores",
            "system": f"{platform.system()} {platform.machine()}",
            "versions": _versions(),
        }
        self._load = [_load()]

    def finish(self) -> None:
        """Notes what holds at the end."""
        self._load.append(_load())
        start, end = self._load
        self.rows["load"] = f"{start} at the start, {end} at the end (1-minute average)"


def _device() -> str:
    devices = jax.devices()
    return f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform})"


def _processor() -> str:
    with contextlib.suppress(OSError):
        if name := re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()):
            return name[1]
    return platform.processor() or platform.machine()


def _cores() -> int | None:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _versions() -> str:
    def known() -> Iterator[str]:
        yield f"Python {platform.python_version()}"
        for package in _PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                yield f"{package} {importlib.metadata.version(package)}"

    return ", ".join(known())


def _load() -> str:
    try:
        return f"{os.getloadavg()[0]:.1f}"
    except (OSError, AttributeError):  # not on every system
        return "unknown"
