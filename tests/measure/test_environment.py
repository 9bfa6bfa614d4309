import importlib.metadata
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from tfopt.measure import environment


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", {"avx2"}, False),
        ("AMD64", {"avx2", "avx512f", "avx512bw"}, False),
        ("x86_64", {"avx2", "avx512_vnni"}, True),
        ("x86_64", {"avx2", "avx_vnni"}, True),
        ("x86_64", {"amx_tile", "amx_int8"}, True),
        ("aarch64", {"asimd"}, True),
    ],
)
def test_has_vnni(machine, flags, expected, monkeypatch):
    monkeypatch.setattr(environment.platform, "machine", lambda: machine)
    monkeypatch.setattr(environment, "cpu_flags", lambda: frozenset(flags))
    assert environment.has_vnni() is expected


on_linux = pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="reads /proc")


def run(code):
    """The last line that a new process prints."""
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, check=True, text=True
    )
    return ended.stdout.splitlines()[-1]


@on_linux
class TestProcessor:
    def test_flags_are_those_of_the_system(self):
        text = Path("/proc/cpuinfo").read_text()
        flags = set(re.search(r"(?m)^(?:flags|Features)\s*: (.*)$", text)[1].split())
        assert environment.cpu_flags() == flags
        assert flags

    def test_name_is_that_of_the_system(self):
        name = environment.cpu_model()
        names = re.findall(
            r"(?m)^(?:model name|Model)\s*: (.*)$", Path("/proc/cpuinfo").read_text()
        )
        assert name in (names or [os.uname().machine])

    def test_cores(self):
        assert 1 <= environment.num_cores() <= os.cpu_count()
        assert environment.num_cores() <= len(os.sched_getaffinity(0))

    def test_affinity_limits_the_cores(self):
        code = """
            import os
            from tfopt.measure import environment
            os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
            print(environment.num_cores())
        """
        assert run(code) == "1"

    def test_times_only_grow(self):
        total, steal = environment.cpu_times()
        assert 0 <= steal <= total
        time.sleep(0.1)
        later, later_steal = environment.cpu_times()
        assert later > total > 0
        assert later_steal >= steal

    def test_work_shows_on_its_core(self):
        core = environment.cores()[0]
        before = environment.busy_times()
        assert set(environment.cores()) <= set(before)
        with environment.only_on([core]):
            end = time.perf_counter() + 0.3
            while time.perf_counter() < end:
                pass
        after = environment.busy_times()
        assert after[core] - before[core] > 0.1 * os.sysconf("SC_CLK_TCK")


@on_linux
class TestOnlyOn:
    def test_holds_for_all_threads_and_no_longer_than_asked(self):
        code = """
            import os, threading
            from tfopt.measure import environment
            done = threading.Event()
            old = threading.Thread(target=done.wait)
            old.start()
            before = os.sched_getaffinity(0)
            core = max(before)
            os.sched_setaffinity(old.native_id, {core})  # as runtimes pin their threads
            with environment.only_on([min(before)]):
                new = threading.Thread(target=done.wait)
                new.start()
                ids = (0, old.native_id, new.native_id)
                inside = [os.sched_getaffinity(thread) for thread in ids]
            after = [os.sched_getaffinity(thread) for thread in ids]
            done.set()
            print(inside == [{min(before)}] * 3, after == [before, {core}, before])
        """
        assert run(code) == "True True"

    def test_ends_with_an_error(self):
        before = environment.cores()
        with pytest.raises(ZeroDivisionError), environment.only_on(before[:1]):
            assert environment.cores() == before[:1]
            raise ZeroDivisionError
        assert environment.cores() == before

    def test_of_none_is_anywhere(self):
        with environment.only_on(None):
            assert environment.cores() == sorted(os.sched_getaffinity(0))


@on_linux
class TestMemory:
    def test_of_the_machine(self):
        kilobytes = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]
        assert 100 << 20 < environment.memory_bytes() <= int(kilobytes) * 1024 * 1.01

    def test_peak_stays_and_resident_memory_falls(self):
        size = 200 << 20
        before = environment.resident_bytes()
        peak_before = environment.peak_resident_bytes()
        array = np.ones(size, np.uint8)
        during = environment.resident_bytes()
        del array
        after, peak = environment.resident_bytes(), environment.peak_resident_bytes()
        assert before <= peak_before
        assert during - before > 0.9 * size
        assert after < during - 0.9 * size
        # The kernel keeps its counts by core and adds them up now and then.
        assert peak > 0.99 * during > after

    def test_peak_is_not_that_of_the_parent(self):
        """What `ru_maxrss` gets wrong: a child begins with its own."""
        array = np.ones(300 << 20, np.uint8)
        code = "from tfopt.measure import environment; print(environment.peak_resident_bytes())"
        child = int(run(code))
        assert 0 < child < array.nbytes < environment.peak_resident_bytes()

    def test_of_another_process(self):
        with subprocess.Popen(["sleep", "60"]) as process:
            try:
                assert 0 < environment.resident_bytes(process.pid) < 100 << 20
            finally:
                process.kill()
        assert environment.resident_bytes(process.pid) == 0
        assert environment.peak_resident_bytes(process.pid) == 0


class TestVersions:
    def test_are_those_of_the_distributions(self):
        found = environment.versions()
        assert found.pop("python") == ".".join(map(str, sys.version_info[:3]))
        assert {"tfopt", "tensorflow", "numpy"} <= set(found)
        for name in environment.PACKAGES:
            if name in found:
                assert found.pop(name) == importlib.metadata.version(name)
            else:
                with pytest.raises(importlib.metadata.PackageNotFoundError):
                    importlib.metadata.version(name)
        assert not found


class TestDescribe:
    def test_can_be_written_as_json(self):
        found = environment.describe()
        assert json.loads(json.dumps(found, allow_nan=False)) == found

    def test_holds_what_a_measurement_depends_on(self):
        found = environment.describe()
        assert found["cpu"] == environment.cpu_model()
        assert found["num_cores"] == environment.num_cores()
        assert found["memory_bytes"] == environment.memory_bytes()
        assert found["versions"] == environment.versions()
        assert set(found["cpu_flags"]) <= environment.cpu_flags()
        assert found["cpu_flags"] == sorted(found["cpu_flags"])
        assert 0 <= found["load_average_1min"] < 10_000
        assert found["system"]
        assert found["frequency_governor"] is None or found["frequency_governor"].isalpha()

    def test_starts_nothing_and_imports_no_library(self):
        code = """
            import sys
            from tfopt.measure import environment
            started = []
            events = {"subprocess.Popen", "os.fork", "os.posix_spawn", "os.system", "os.exec"}
            sys.addaudithook(lambda event, arguments: event in events and started.append(event))
            environment.describe()
            print(started + sorted({"tensorflow", "pandas", "numpy"} & set(sys.modules)))
        """
        assert run(code) == "[]"


class TestContainer:
    def limits(self, monkeypatch, files):
        monkeypatch.setattr(environment, "_read", lambda path: files.get(path, ""))
        return environment.container_limits()

    def test_of_both_kinds_of_control_groups(self, monkeypatch):
        second = {
            "/sys/fs/cgroup/cpu.max": "150000 100000\n",
            "/sys/fs/cgroup/memory.max": "5000\n",
        }
        expected = {"cores": 1.5, "memory_bytes": 5000}
        assert self.limits(monkeypatch, second) == expected
        assert environment.num_cores() == 1
        assert environment.memory_bytes() == 5000
        first = {
            "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n",
            "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": "5000\n",
        }
        assert self.limits(monkeypatch, first) == expected

    @pytest.mark.parametrize(
        "files",
        [
            {},
            {"/sys/fs/cgroup/cpu.max": "max 100000\n", "/sys/fs/cgroup/memory.max": "max\n"},
            {"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
             "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
             "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"},
        ],
    )  # fmt: skip
    def test_no_limit(self, files, monkeypatch):
        assert self.limits(monkeypatch, files) == {}


class TestGpus:
    @pytest.fixture(autouse=True)
    def anew(self):
        environment.gpus.cache_clear()
        yield
        environment.gpus.cache_clear()

    def answer(self, tmp_path, monkeypatch, script):
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        return environment.gpus()

    def test_name_driver_and_capability(self, tmp_path, monkeypatch):
        script = 'echo "NVIDIA H200, 580.95.05, 9.0"; echo "Tesla P4, 580.95.05, [N/A]"'
        found = self.answer(tmp_path, monkeypatch, script)
        assert [str(gpu) for gpu in found] == [
            "NVIDIA H200, driver 580.95.05",
            "Tesla P4, driver 580.95.05",
        ]
        assert [gpu.compute_capability for gpu in found] == [(9, 0), None]
        assert environment.describe()["gpus"] == [str(gpu) for gpu in found]

    def test_drivers_that_know_no_capability(self, tmp_path, monkeypatch):
        script = 'case "$1" in *compute_cap*) exit 2;; esac; echo "Tesla K80, 390.12"'
        (found,) = self.answer(tmp_path, monkeypatch, script)
        assert found == environment.Gpu("Tesla K80", "390.12", None)

    def test_lines_that_are_no_gpu(self, tmp_path, monkeypatch):
        assert self.answer(tmp_path, monkeypatch, "echo a warning") == ()

    def test_those_that_are_visible(self, tmp_path, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,7")
        script = 'echo "Tesla V100, 580.1, 7.0"; echo "NVIDIA H200, 580.1, 9.0"'
        (found,) = self.answer(tmp_path, monkeypatch, script)
        assert found.compute_capability == (9, 0)

    @pytest.mark.parametrize("visible", ["GPU-b2", "GPU-b2, GPU-a1", "1"])
    def test_those_that_a_uuid_names(self, tmp_path, monkeypatch, visible):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        script = """first="Tesla V100, 580.1, 7.0"; second="NVIDIA H200, 580.1, 9.0"
        case "$*" in
          *--id=GPU-a1*) echo "$first";;
          *--id=GPU-b2*) echo "$second";;
          *--id=*) exit 6;;
          *) echo "$first"; echo "$second";;
        esac"""
        names = [gpu.name for gpu in self.answer(tmp_path, monkeypatch, script)]
        wanted = ["NVIDIA H200", "Tesla V100"] if "," in visible else ["NVIDIA H200"]
        assert names == wanted

    def test_all_where_nvidia_smi_does_not_know_the_name(self, tmp_path, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b")
        script = 'case "$*" in *--id=*) exit 6;; esac; echo "NVIDIA H200, 580.1, 9.0"'
        assert len(self.answer(tmp_path, monkeypatch, script)) == 1

    @pytest.mark.parametrize("hidden", ["", "-1"])
    def test_none_where_they_are_hidden(self, tmp_path, monkeypatch, hidden):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert self.answer(tmp_path, monkeypatch, 'echo "NVIDIA H200, 580.95.05, 9.0"') == ()

    def test_none_where_it_fails(self, tmp_path, monkeypatch):
        assert self.answer(tmp_path, monkeypatch, "echo no devices; exit 9") == ()

    def test_none_where_it_is_not_there(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        assert environment.gpus() == ()
