"""The machine: processor, memory, GPUs, limits, load and versions.

It reads files, and asks nvidia-smi where there is one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import platform
import re
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from tfopt.measure import gpu

PACKAGES = (
    "tfopt", "tensorflow", "keras", "tf_keras", "ai-edge-litert", "tf2onnx", "onnx", "onnxruntime",
    "onnxruntime-gpu", "openvino", "nncf", "tensorrt", "tensorrt-bindings", "tensorrt-libs",
    "tensorrt-cu12", "tensorrt-cu13", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "cuda-bindings",
    "numpy", "pandas",
)  # fmt: skip


@functools.cache
def _cpu_info() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {"model name": platform.processor() or platform.machine(), "flags": ""}
    info: dict[str, str] = {}
    for line in path.read_text().splitlines():
        name, colon, value = line.partition(":")
        if colon:
            info.setdefault(name.strip(), value.strip())
    return info


def cpu_model() -> str:
    """The processor's name."""
    info = _cpu_info()
    return info.get("model name") or info.get("Model") or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Instruction set extensions as Linux names them, for example `avx512_vnni`."""
    info = _cpu_info()
    return frozenset((info.get("flags") or info.get("Features") or "").split())


_VNNI = frozenset({"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"})


def has_vnni() -> bool:
    """Whether products of uint8 and int8 are added up in 32 bits: VNNI or AMX, or no x86 at all.

    Elsewhere the instruction VPMADDUBSW adds two products in 16 bits and saturates as soon as
    weights have 8 bits
    (https://uxlfoundation.github.io/oneDNN/dev_guide_int8_computations.html).
    """
    is_x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
    return not is_x86 or bool(_VNNI & cpu_flags())


def container_limits() -> dict[str, float]:
    """What a container allows, as `cores` and `memory_bytes`; a limit that it lacks is missing."""
    limits: dict[str, float] = {}
    quota = _read("/sys/fs/cgroup/cpu.max").split() or [
        _read(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us").strip() for name in ("quota", "period")
    ]
    if len(quota) == 2 and all(value.isdigit() for value in quota):  # "max" and -1 are no limit
        limits["cores"] = int(quota[0]) / int(quota[1])
    memory = (
        _read("/sys/fs/cgroup/memory.max") or _read("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    ).strip()
    if memory.isdigit() and int(memory) < _physical_memory_bytes():
        limits["memory_bytes"] = int(memory)
    return limits


CAN_CHOOSE_CORES = hasattr(os, "sched_setaffinity")


@functools.cache
def physical_core(core: int) -> str:
    """What the threads of one physical core have in common."""
    siblings = _read(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    return siblings.strip() or str(core)


def cores() -> list[int]:
    """The numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def num_cores() -> int:
    """Cores that this process may use: affinity and container limit."""
    count = len(cores())
    return min(count, max(1, int(container_limits().get("cores", count))))


@contextlib.contextmanager
def only_on(cores: Collection[int] | None) -> Iterator[None]:
    """Keeps every thread of this process on some cores; anywhere where None or not on Linux."""
    tasks = Path("/proc/self/task")
    if cores is None or not tasks.is_dir():
        yield
        return
    before = os.sched_getaffinity(0)
    of_threads = {}
    for thread in (int(task.name) for task in tasks.iterdir()):
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            of_threads[thread] = os.sched_getaffinity(thread)
            os.sched_setaffinity(thread, cores)
    try:
        yield
    finally:
        for thread in (int(task.name) for task in tasks.iterdir()):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread, of_threads.get(thread, before))


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or the container's limit."""
    return int(container_limits().get("memory_bytes", _physical_memory_bytes()))


def _physical_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU.

    Attributes:
      name: as `nvidia-smi` gives it.
      driver: its version.
      compute_capability: (major, minor); None where the driver is too old to tell.
    """

    name: str
    driver: str
    compute_capability: tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"{self.name}, driver {self.driver}"


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that `nvidia-smi` finds and CUDA_VISIBLE_DEVICES leaves visible."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return ()
    chosen = [text.strip() for text in visible.split(",")] if visible else []
    if any(text.startswith("GPU-") for text in chosen):
        by_uuid = [found for text in chosen for found in _gpus(text)[:1]]
        if by_uuid:  # CUDA takes the beginning of one, too, and nvidia-smi does not
            return tuple(by_uuid)
    found = _gpus(None)
    if chosen and all(text.isdecimal() for text in chosen):
        return tuple(found[int(text)] for text in chosen if int(text) < len(found))
    return tuple(found)


def _gpus(which: str | None) -> list[Gpu]:
    """What `nvidia-smi` finds under a number or UUID; None is every one."""
    fields = ("name", "driver_version", "compute_cap")
    found = []
    for name, driver, *rest in gpu.ask("gpu", fields, which) or gpu.ask("gpu", fields[:2], which):
        version = re.fullmatch(r"(\d+)\.(\d+)", "".join(rest))
        found.append(Gpu(name, driver, (int(version[1]), int(version[2])) if version else None))
    return found


def resident_bytes(pid: int | str = "self") -> int:
    """Memory that a process holds now; 0 when it is gone or the system does not say."""
    return _status_bytes(pid, "VmRSS")


def peak_resident_bytes(pid: int | str = "self") -> int:
    """The most memory that a process held since it started; 0 when unknown.

    Linux's VmHWM: `ru_maxrss` would carry the parent's memory across a fork.
    """
    return _status_bytes(pid, "VmHWM")


def _status_bytes(pid: int | str, key: str) -> int:
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def load_average() -> float:
    """Processes that ran or wanted to, on average over the last minute."""
    return os.getloadavg()[0]


def cpu_times() -> tuple[float, float]:
    """Processor time since boot, all of it and what a hypervisor gave to others; 0 if unknown."""
    times = _core_times().get("cpu", [0.0] * 8)
    return sum(times), times[_STEAL]


def busy_times() -> dict[int, float]:
    """Processor time since boot that each core was not idle for; empty if unknown."""
    return {
        int(name[3:]): sum(times) - times[_IDLE] - times[_WAITING]
        for name, times in _core_times().items()
        if name != "cpu"
    }


_TASKS = Path("/proc/self/task")


def other_threads_run() -> bool:
    """Whether another thread of this process computes; where the system cannot say, within 10 ms.

    Threads of Python that wait for their turn with the interpreter count as asleep.
    """
    try:
        threads = [task.name for task in _TASKS.iterdir()]
    except OSError:
        begin, used = time.perf_counter(), time.process_time()
        time.sleep(0.01)
        return time.process_time() - used > 0.2 * (time.perf_counter() - begin)
    threads.remove(str(threading.get_native_id()))
    stats = (_read(f"{_TASKS}/{thread}/stat") for thread in threads)
    return any(stat.rpartition(") ")[2].startswith("R") for stat in stats)


_IDLE, _WAITING, _STEAL = 3, 4, 7  # columns of /proc/stat, see proc_stat(5)


def _core_times() -> dict[str, list[float]]:
    lines = [line.split() for line in _read("/proc/stat").splitlines() if line.startswith("cpu")]
    return {line[0]: [float(value) for value in line[1:9]] for line in lines if len(line) > 8}


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def versions() -> dict[str, str]:
    """Installed versions of everything that shapes a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _system() -> str:
    """As `platform.platform()`, which would start `uname -p`."""
    system = platform.uname()
    parts = [system.system, system.release, system.machine, "".join(platform.libc_ver())]
    return "-".join(filter(None, parts))


def describe() -> dict[str, Any]:
    """Everything about the machine that a measurement is recorded with."""
    governor = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip()
    interesting = ("avx2", "avx512", "amx", "bf16", "f16c", "fma", "asimd", "sve", "i8mm")
    return {
        "cpu": cpu_model(),
        "cpu_flags": sorted(flag for flag in cpu_flags() if flag.startswith(interesting)),
        "num_cores": num_cores(),
        "container_limits": container_limits(),
        "memory_bytes": memory_bytes(),
        "gpus": [str(found) for found in gpus()],
        "gpu_state": gpu.state(),
        "system": _system(),
        "frequency_governor": governor or None,
        "load_average_1min": load_average(),
        "versions": versions(),
    }
