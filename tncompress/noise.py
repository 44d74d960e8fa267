"""What else a machine does while something is measured on it, and the settings that make it slow or fast."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tncompress.allocator import LARGEST, PAD, keeps_memory

ADVISED = {
    "MALLOC_MMAP_THRESHOLD_": str(LARGEST),
    "MALLOC_TRIM_THRESHOLD_": str(LARGEST),
    "MALLOC_TOP_PAD_": str(PAD),
    "OMP_WAIT_POLICY": "ACTIVE",
}
"""Environment variables to be set before Python starts, and their values.

The first three make glibc keep large tensors' memory instead of asking the system for it again and again;
the last makes OpenMP's threads wait for work awake, which matters for short products on several threads.
"""

ALLOCATOR = "MALLOC_"
"""How the names of those begin that are the allocator's."""

SPREAD, OTHERS, LOADED = 0.10, 0.20, 0.50
"""What is too noisy: quartiles so far apart, relative to the median; so many cores taken by others; where
that is not known, such a load average."""

CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""What torch calls the instructions of processors that multiply bfloat16, on x86 and on ARM."""

VECTORS = {"AVX512": "AVX-512"}
"""How torch's names of vector instructions are written, where not as they are."""

PROC_STAT = Path("/proc/stat")


@dataclass
class Load:
    """What the machine did beside us: ``before`` is the load average when we came, None if there is none."""

    before: float | None = field(default_factory=lambda: load_average())
    _taken: float | None = 0.0
    _seconds: float = 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Add what happens during the block, in which only this process should have work."""
        start, busy, own = time.monotonic(), _busy_seconds(), _own_seconds()
        yield
        self._seconds += time.monotonic() - start
        after = _busy_seconds()
        if busy is None or after is None or self._taken is None:
            self._taken = None
        else:
            self._taken += (after - busy) - (_own_seconds() - own)

    @property
    def others(self) -> float | None:
        """The cores' worth of time that other processes took; None where the system does not tell."""
        if self._taken is None or self._seconds == 0:
            return None
        return max(0.0, self._taken) / self._seconds

    def warnings(self, spread: float) -> list[str]:
        """Return what speaks against figures taken meanwhile, whose quartiles lie ``spread`` apart."""
        found = []
        if spread > SPREAD:
            found.append(
                f"the machine is noisy: quartiles are up to {100 * spread:.0f} % of the median apart "
                f"(more than {100 * SPREAD:.0f} %)"
            )
        others = self.others
        if others is not None and others > OTHERS:
            cores = os.cpu_count() or 1
            found.append(f"other processes took {others:.1f} of {cores} cores while this was measured")
        elif others is None and self.before is not None and self.before > LOADED:
            found.append(f"the load average before this was measured was {self.before:.1f}")
        return found


def load_average() -> float | None:
    """Return the load average of the last minute, or None where the system has none."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None


def settings() -> dict[str, str | None]:
    """Return the values of the advised environment variables here, None for those that are not set.

    After :func:`tncompress.keep_memory` the allocator's are as advised, whatever the environment says.
    """
    kept = {name: value for name, value in ADVISED.items() if keeps_memory() and name.startswith(ALLOCATOR)}
    return {name: os.environ.get(name) for name in ADVISED} | kept


def hints(threads: int, device: torch.device | None = None) -> list[str]:
    """Return what could make figures on this machine better: advised settings that are absent."""
    if device is not None and device.type != "cpu":
        return []
    missing = [name for name, value in settings().items() if value is None and _matters(name, threads)]
    if not missing:
        return []
    words = " ".join(f"{name}={ADVISED[name]}" for name in missing)
    called = " (or after tncompress.keep_memory())" if missing[0].startswith(ALLOCATOR) else ""
    return [f"may be faster in an environment with {words}{called}"]


def _matters(name: str, threads: int) -> bool:
    """Say whether the variable is read here: the allocator's by glibc, and waiting takes two."""
    if name.startswith(ALLOCATOR):
        return platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"
    return threads > 1


def device_name(device: torch.device | str = "cpu") -> str:
    """Return the name of the processor or GPU that computes; a processor's with what it computes with.

    Virtual machines name generations alike that differ by a factor of two or more: the vector instructions
    that torch uses, and whether there are any for bfloat16, tell them apart.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return str(device.type)
    vectors = torch.backends.cpu.get_cpu_capability()
    words = [VECTORS.get(vectors, vectors), *(["bfloat16"] if has_bf16() else [])]
    return f"{_processor()} ({', '.join(words)})"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def has_bf16(device: torch.device | str = "cpu") -> bool:
    """Say whether the processor or GPU computes in bfloat16, which others emulate many times slower."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    told = getattr(torch.cpu, "get_capabilities", None)  # oneDNN says yes to any AVX-512, and emulates it
    if told is not None:
        return any(told().get(name, False) for name in CPU_BF16)
    older = getattr(torch._C._cpu, "_is_avx512_bf16_supported", None)  # torch before 2.11
    return older is not None and bool(older())


def _own_seconds() -> float:
    taken = os.times()
    return taken.user + taken.system + taken.children_user + taken.children_system


def _busy_seconds() -> float | None:
    """Return the seconds for which all cores together did something, or were not given to this system."""
    try:
        fields = [int(field) for field in PROC_STAT.read_text().split("\n", 1)[0].split()[1:9]]
        user, nice, system, _, _, irq, softirq, steal = fields
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
