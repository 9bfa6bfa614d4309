import json
import os
import subprocess
import sys

import pytest

from tests import nvidia_smi
from tests.nvidia_smi import H200_IDLE, H200_IN_PARTS, RTX_2080_OF_DRIVER_465, RTX_4080_UNDER_LOAD
from tfopt.measure import environment, gpu

MIB = 1 << 20
STATE = {"num_other_processes": 0, "clock_reasons": [], "sm_clock_mhz": 1980}


@pytest.fixture(autouse=True)
def anew():
    environment.gpus.cache_clear()
    yield
    environment.gpus.cache_clear()


@pytest.fixture
def stranger():
    """A process that was not started by this one, as far as its parents tell."""
    with subprocess.Popen(
        [sys.executable, "-c", "import os, time; os.fork() and os._exit(0); print(os.getpid(), "
         "flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
    ) as parent:  # fmt: skip
        pid = int(parent.stdout.readline())
        parent.wait()
        yield pid
        os.kill(pid, 9)


class TestState:
    def test_of_a_gpu_at_rest(self, tmp_path, monkeypatch):
        nvidia_smi.install(tmp_path, monkeypatch, H200_IDLE)
        assert gpu.state() == {
            "sm_clock_mhz": 345,
            "max_sm_clock_mhz": 1980,
            "memory_clock_mhz": 3201,
            "max_memory_clock_mhz": 3201,
            "busy_share": 0.0,
            "memory_used_bytes": 0,
            "memory_total_bytes": 143771 * MIB,
            "temperature_c": 37,
            "power_w": 85.12,
            "power_limit_w": 700.0,
            "is_persistent": True,
            "is_ecc_on": True,
            "is_mig_on": False,
            "clock_reasons": ["gpu_idle"],
            "num_other_processes": 0,
        }
        assert len(nvidia_smi.questions(tmp_path)) == 2  # for the GPU, and for its processes

    def test_of_a_busy_one_that_does_not_tell_everything(self, tmp_path, monkeypatch):
        nvidia_smi.install(tmp_path, monkeypatch, RTX_4080_UNDER_LOAD)
        found = gpu.state()
        assert found["busy_share"] == 0.07
        assert found["memory_used_bytes"] == 1474 * MIB
        assert found["clock_reasons"] == []
        assert found["is_persistent"] is False
        assert found["is_ecc_on"] is found["is_mig_on"] is None
        assert found["num_other_processes"] is None, "memory is in use by nobody: they are hidden"
        assert json.loads(json.dumps(found, allow_nan=False)) == found

    def test_of_one_in_parts(self, tmp_path, monkeypatch):
        nvidia_smi.install(tmp_path, monkeypatch, H200_IN_PARTS)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-0b8d6c8c-8dc1-5d7e-a7b9-0a3a3d7b5a3c")
        found = gpu.state()
        assert found["is_mig_on"] is True
        assert found["busy_share"] is None
        assert found["num_other_processes"] == 0

    def test_of_a_driver_with_the_old_name_of_reasons(self, tmp_path, monkeypatch):
        nvidia_smi.install(tmp_path, monkeypatch, RTX_2080_OF_DRIVER_465)
        assert gpu.state()["clock_reasons"] == ["gpu_idle"]

    @pytest.mark.parametrize(
        ("bits", "names"),
        [
            ("0x0000000000000000", []),
            ("0x0000000000000004", ["sw_power_cap"]),
            ("0x0000000000000048", ["hw_slowdown", "hw_thermal_slowdown"]),
            ("0x0000000000000120", ["sw_thermal_slowdown", "display_clock_setting"]),
            ("[N/A]", None),
            ("[Not Supported]", None),
        ],
    )
    def test_reasons_are_the_bits_of_nvml(self, bits, names, tmp_path, monkeypatch):
        state = {**H200_IDLE, "clocks_event_reasons.active": bits}
        nvidia_smi.install(tmp_path, monkeypatch, state)
        assert gpu.state()["clock_reasons"] == names

    @pytest.mark.parametrize(
        "text",
        ["[N/A]", "[Not Supported]", "[Unknown Error]", "[GPU requires reset]",
         "[Requested functionality has been deprecated]"],
    )  # fmt: skip
    def test_what_it_does_not_tell_is_none(self, text, tmp_path, monkeypatch):
        nvidia_smi.install(tmp_path, monkeypatch, dict.fromkeys(H200_IDLE, text))
        found = gpu.state()
        assert found.pop("num_other_processes") == 0
        assert set(found.values()) == {None}

    def test_none_without_a_gpu(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        assert gpu.state() is None
        assert gpu.used_bytes() is None
        assert gpu.held_bytes(None) is None

    @pytest.mark.parametrize("hidden", ["", "-1", "7"])
    def test_none_where_it_is_hidden(self, hidden, tmp_path, monkeypatch):
        nvidia_smi.install(tmp_path, monkeypatch, H200_IDLE)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert gpu.state() is None

    def test_is_that_of_the_first_that_is_visible(self, tmp_path, monkeypatch):
        nvidia_smi.install(tmp_path, monkeypatch, H200_IDLE)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,0")
        gpu.state()
        assert all("--id=3" in asked for asked in nvidia_smi.questions(tmp_path))

    def test_is_part_of_the_environment(self, tmp_path, monkeypatch):
        nvidia_smi.install(tmp_path, monkeypatch, H200_IDLE)
        assert environment.describe()["gpu_state"] == gpu.state()
        assert [str(found) for found in environment.gpus()] == ["NVIDIA H200, driver 580.173.02"]


class TestProcesses:
    def state(self, tmp_path, monkeypatch, *processes):
        nvidia_smi.install(tmp_path, monkeypatch, RTX_4080_UNDER_LOAD, processes=processes)
        return gpu.state()["num_other_processes"]

    def test_this_one_and_those_it_started_are_no_others(self, tmp_path, monkeypatch, stranger):
        with subprocess.Popen(["sleep", "60"]) as child:
            own = [("asking", "503 MiB"), (child.pid, "360 MiB")]
            assert self.state(tmp_path, monkeypatch, *own) == 0
            assert self.state(tmp_path, monkeypatch, *own, (stranger, "25 MiB")) == 1
            child.kill()

    def test_a_parent_is_another(self, tmp_path, monkeypatch):
        assert self.state(tmp_path, monkeypatch, (os.getppid(), "25 MiB")) == 1

    def test_numbers_of_another_system_tell_nothing(self, tmp_path, monkeypatch):
        # As in https://github.com/NVIDIA/nvidia-docker/issues/1483.
        assert self.state(tmp_path, monkeypatch, (2**22 + 1, "185 MiB")) is None


class TestMemory:
    def test_is_what_the_process_holds(self, tmp_path, monkeypatch):
        processes = [(os.getppid(), "360 MiB"), ("asking", "503 MiB")]
        nvidia_smi.install(tmp_path, monkeypatch, RTX_4080_UNDER_LOAD, processes=processes)
        assert gpu.used_bytes() == 1474 * MIB
        assert gpu.held_bytes(0) == 503 * MIB

    @pytest.mark.parametrize("listed", [(), [(2**22 + 1, "185 MiB")], [("asking", "[N/A]")]])
    def test_where_that_is_not_told_it_is_what_more_is_in_use(self, listed, tmp_path, monkeypatch):
        nvidia_smi.install(tmp_path, monkeypatch, RTX_4080_UNDER_LOAD, processes=listed)
        assert gpu.held_bytes(474 * MIB) == 1000 * MIB
        assert gpu.held_bytes(1474 * MIB) is None, "it holds nothing"
        assert gpu.held_bytes(1500 * MIB) is None
        assert gpu.held_bytes(None) is None


class TestNotes:
    @pytest.mark.parametrize(
        ("before", "after", "notes"),
        [
            ({}, {}, []),
            ({"num_other_processes": None}, {"clock_reasons": None, "sm_clock_mhz": None}, []),
            ({}, {"num_other_processes": 1},
             ["Another process held the GPU while it was timed."]),
            ({"num_other_processes": 3}, {"num_other_processes": 2},
             ["3 other processes held the GPU while it was timed."]),
            ({}, {"clock_reasons": ["sw_power_cap"]}, []),
            ({"clock_reasons": ["sw_thermal_slowdown"]},
             {"clock_reasons": ["hw_slowdown", "hw_thermal_slowdown"]},
             ["The GPU slowed itself down while it was timed (hw_slowdown, hw_thermal_slowdown, "
              "sw_thermal_slowdown)."]),
            ({}, {"sm_clock_mhz": 1782}, []),
            ({}, {"sm_clock_mhz": 1780},
             ["The GPU's clock fell from 1980 to 1780 MHz while it was timed."]),
            ({"sm_clock_mhz": 345, "clock_reasons": ["gpu_idle"]}, {}, []),
            ({}, {"sm_clock_mhz": 345, "clock_reasons": ["gpu_idle"]}, []),
        ],
    )  # fmt: skip
    def test_table(self, before, after, notes):
        assert gpu.notes_on({**STATE, **before}, {**STATE, **after}) == notes

    def test_nothing_without_a_gpu(self):
        assert gpu.notes_on(None, None) == gpu.notes_on(STATE, None) == []
