"""What Linux says of processor time and of the memory of processes."""

import pathlib
import threading
import time

_IDLE, _IOWAIT, _STEAL = 3, 4, 7  # places in a line of /proc/stat, proc(5)


class StealMeter:
    """Measures which share of the processor time that was wanted the hypervisor withheld."""

    def __init__(self) -> None:
        self._begin = self._read()

    def share(self) -> float | None:
        """Returns steal / (everything but idle) since the start; None when nothing ran."""
        ticks = [now - then for now, then in zip(self._read(), self._begin, strict=True)]
        wanted = sum(ticks) - ticks[_IDLE] - ticks[_IOWAIT]
        return ticks[_STEAL] / wanted if wanted > 0 else None

    @staticmethod
    def _read() -> list[int]:
        with pathlib.Path("/proc/stat").open() as file:
            # Guest time, which follows, is part of user time.
            return [int(field) for field in file.readline().split()[1 : _STEAL + 2]]


class MemorySampler(threading.Thread):
    """Samples the memory of a process and all its descendants until they end.

    Memory is the proportional set size: a page that n processes share counts 1/n in each, so that
    the sum over processes counts it once. (Processes outside the tree that map the same libraries
    take their part: run on an otherwise quiet machine.)

    Args:
      pid: the root of the tree.
      with_root: False counts its descendants only.
      interval_s: from the end of one sample to the start of the next.

    Attributes:
      peak_bytes: the largest sum.
      peak_resident_bytes: the largest sum of resident set sizes, shared pages counted repeatedly.
      processes_at_peak: the command and bytes of each process in the largest sum.
      num_samples: how many were taken.
      cpu_s: processor time that sampling itself took.
    """

    def __init__(self, pid: int, with_root: bool = True, interval_s: float = 0.1) -> None:
        super().__init__(daemon=True)
        self._pid, self._with_root, self._interval_s = pid, with_root, interval_s
        self._stopped = threading.Event()
        self.peak_bytes = 0
        self.peak_resident_bytes = 0
        self.processes_at_peak: list[tuple[str, int]] = []
        self.num_samples = 0
        self.cpu_s = 0.0

    def run(self) -> None:
        """Samples until `stop`."""
        while not self._stopped.wait(self._interval_s):
            pids = tree(self._pid)
            sizes = {pid: _memory(pid) for pid in pids if self._with_root or pid != self._pid}
            total = sum(proportional for proportional, _ in sizes.values())
            if total > self.peak_bytes:
                self.peak_bytes = total
                self.processes_at_peak = [(_command(pid), size) for pid, (size, _) in sizes.items()]
            resident = sum(resident for _, resident in sizes.values())
            self.peak_resident_bytes = max(self.peak_resident_bytes, resident)
            self.num_samples += 1
            self.cpu_s = time.thread_time()

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        self.join()


def tree(root: int) -> list[int]:
    """Returns the ids of a process and of all its descendants."""
    children: dict[int, list[int]] = {}
    for folder in pathlib.Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                # The name, in parentheses, may itself hold spaces and parentheses.
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has just ended
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def _memory(pid: int) -> tuple[int, int]:
    """Returns proportional and resident set size in bytes; zeros for a process that has ended."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
    return sizes.get("Pss", 0), sizes.get("Rss", 0)


def _command(pid: int) -> str:
    try:
        command = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return "ended"
    return command.replace(b"\0", b" ").decode(errors="replace").strip()[-100:]
