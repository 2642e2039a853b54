"""The machine that figures come from: they mean nothing without its name."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

from vidlm import __version__
from vidlm.cli.progress import Progress


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor (or GPU), cores, threads, versions, and whether vidlm's own kernels are used."""
    import torch

    from vidlm.native import status

    kernels = status()
    named = {
        "cpu": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "vidlm": __version__,
        "kernels": kernels.used,
        "kernels_reason": kernels.reason,
    }
    if device.startswith("cuda"):
        named["gpu"] = torch.cuda.get_device_name(device)
    return named


def prepare_kernels(progress: Progress) -> None:
    """Compile the kernels where that has to be done, as a stage of its own, and tell where there
    are none."""
    from vidlm import native

    warned: list[str] = []
    state = native.prepare(progress.now, warned.append)
    if state.seconds:
        progress.done(state.seconds, "compile", "CPU kernels for this machine, once")
    for what in warned:
        progress.note(what)
    if os.environ.get(native.SWITCH) == "0":
        progress.note(f"no CPU kernels ({state.reason}); plain torch is used, which is slower")


def kernel_lines() -> list[str]:
    """For people: whether there are kernels, then each kind of work."""
    from vidlm import native

    state = native.status()
    kept = f", kept in {state.path.parent}" if state.path else ""
    head = state.reason + kept if state.used else f"none, plain torch is used: {state.reason}"
    return [head, *(f"  {kernel}" for kernel in state.kernels if state.used)]


def sentence(named: dict[str, Any]) -> str:
    """The same for people."""
    kernels = "vidlm's kernels" if named["kernels"] else f"plain torch ({named['kernels_reason']})"
    cores, threads = _counted(named["cores"], "core"), _counted(named["threads"], "thread")
    where = f"{named['gpu']}, " if "gpu" in named else ""
    return f"{where}{named['cpu']}, {cores}, {threads}, torch {named['torch']}, {kernels}"


def processor() -> str:
    """The CPU's own name where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    found = None
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    return " ".join(name.split())


def cores() -> int:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_bytes() -> int | None:
    """The most memory this process has held; None where the system does not tell."""
    status = Path("/proc/self/status")  # ru_maxrss would begin with the parent's
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.is_file() else None
    return int(found[1]) << 10 if found else None


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("s" if count != 1 else "")
