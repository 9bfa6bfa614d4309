import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from tfopt import isolation
from tfopt.errors import ConversionError, InputError, ResultError
from tfopt.isolation import Limits, Worker, WorkerError
from tfopt.measure import environment

HELPER = """
import os, signal, sys, time
from tfopt.errors import ConversionError, InputError, ResultError

kept = []

def echo(*args, **kwargs):
    return args, kwargs

def count():
    kept.append(None)
    return len(kept), os.getpid()

def main_file():
    return getattr(sys.modules["__main__"], "__file__", None)

def ignores_interrupts():
    return os.getsid(0) == os.getpid()

def fail(kind, message):
    raise {"input": InputError, "conversion": ConversionError, "result": ResultError,
           "zero": ZeroDivisionError, "value": ValueError}[kind](message)

class OwnError(ConversionError):
    pass

def fail_as_subclass():
    raise OwnError("of its own kind")

def fail_without_words():
    raise RuntimeError

def abort():
    os.abort()

def segfault():
    os.kill(os.getpid(), signal.SIGSEGV)

def end(status):
    os._exit(status)

def leave():
    sys.exit(3)

def say_and_leave():
    print("check failed: x > 0.\\n", file=sys.stderr)
    sys.exit(3)

def hang():
    time.sleep(600)

def grow(num_bytes):
    kept.append(b"x" * num_bytes)
    time.sleep(600)

def hold(num_bytes):
    kept.append(b"x" * num_bytes)
    return os.getpid()

def speak():
    print("to the output")
    print("to the errors", file=sys.stderr)
    os.write(1, b"from a library\\n")

def no_result():
    return lambda: None

def is_imported(name):
    return name in sys.modules
"""

ECHO = "worker_helper:echo"


@pytest.fixture
def helper(tmp_path, monkeypatch):
    """Makes `worker_helper` importable, here and in workers."""
    (tmp_path / "worker_helper.py").write_text(HELPER)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def worker(helper):
    with Worker(helper / "logs" / "worker.log") as worker:
        yield worker


def is_gone(pid):
    """Whether a process has ended; one that nobody waited for counts."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        # The first thread can be done while others still hold the process's files.
        return state == "Z" and len(list(Path(f"/proc/{pid}/task").iterdir())) == 1
    except FileNotFoundError:
        return True


def wait_until_gone(pid):
    deadline = time.monotonic() + 30
    while not is_gone(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


class TestCall:
    def test_arguments_and_results_travel(self, worker):
        array = np.arange(6, dtype=np.float16).reshape(2, 3)
        args, kwargs = worker.call(ECHO, 1, array, name={"a": (None, b"\0")})
        assert args[0] == 1
        np.testing.assert_array_equal(args[1], array)
        assert args[1].dtype == np.float16
        assert kwargs == {"name": {"a": (None, b"\0")}}

    def test_large_results_travel(self, worker):
        array = np.random.default_rng(0).bytes(30 << 20)
        assert worker.call(ECHO, array) == ((array,), {})

    def test_stays_warm(self, worker):
        first, second = worker.call("worker_helper:count"), worker.call("worker_helper:count")
        assert (first[0], second[0]) == (1, 2)
        assert first[1] == second[1] != os.getpid()
        assert worker.num_starts == 1
        assert worker.startup_s > 0

    def test_starts_late_and_again_after_close(self, worker):
        assert worker.num_starts == 0
        _, first = worker.call("worker_helper:count")
        worker.close()
        assert is_gone(first)
        assert worker.peak_bytes > 0
        count, second = worker.call("worker_helper:count")
        assert count == 1
        assert second != first
        assert worker.num_starts == 2
        worker.close()
        worker.close()

    def test_context_ends_the_child(self, helper):
        with Worker(helper / "log") as worker:
            _, pid = worker.call("worker_helper:count")
            assert not is_gone(pid)
        assert is_gone(pid)

    def test_child_gets_no_interrupt_from_the_terminal(self, worker):
        assert worker.call("worker_helper:ignores_interrupts")

    def test_arguments_that_cannot_travel(self, worker):
        with pytest.raises(Exception, match=r"pickle|local object"):
            worker.call(ECHO, lambda: None)
        assert worker.call(ECHO) == ((), {})


class TestErrors:
    @pytest.mark.parametrize(
        ("kind", "expected"),
        [("input", InputError), ("conversion", ConversionError), ("result", ResultError)],
    )
    def test_own_errors_pass_through(self, kind, expected, worker):
        with pytest.raises(expected) as caught:
            worker.call("worker_helper:fail", kind, "because\nof this")
        assert type(caught.value) is expected
        assert str(caught.value) == "because\nof this"
        assert worker.call(ECHO, 1) == ((1,), {})
        assert worker.num_starts == 1

    def test_subclasses_come_as_what_they_are_a_kind_of(self, worker):
        with pytest.raises(ConversionError) as caught:
            worker.call("worker_helper:fail_as_subclass")
        assert str(caught.value) == "of its own kind"

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (("worker_helper:fail", "zero", "no kernel"), "ZeroDivisionError: no kernel"),
            (("worker_helper:fail", "value", "\n\n  first \nsecond"), "ValueError: first"),
            (
                (
                    "worker_helper:fail",
                    "value",
                    "Graph execution error:\n\nDetected at node a defined at (most recent call "
                    "last):\n<stack traces unavailable>\nDetected unsupported operations: Foo",
                ),
                "ValueError: Detected unsupported operations: Foo",
            ),
            (("worker_helper:fail", "value", "x" * 999), "ValueError: " + "x" * 300),
            (("worker_helper:fail_without_words",), "RuntimeError"),
            (("worker_helper:no_such_function",), "AttributeError: .*no_such_function.*"),
            (("no_such_module:f",), "ModuleNotFoundError: .*no_such_module.*"),
        ],
    )
    def test_others_become_a_reason_of_one_line(self, arguments, reason, worker):
        with pytest.raises(WorkerError, match=f"^{reason}$") as caught:
            worker.call(*arguments)
        assert isinstance(caught.value, ConversionError)
        assert worker.call(ECHO, 1) == ((1,), {})
        assert worker.num_starts == 1
        assert "Traceback" in worker._log.read_text()

    @pytest.mark.parametrize(
        ("function", "how"),
        [
            ("worker_helper:abort", "was ended by SIGABRT"),
            ("worker_helper:segfault", "was ended by SIGSEGV"),
            ("worker_helper:leave", "ended with status 3"),
            ("worker_helper:no_result", "ended with status 1"),
        ],
    )
    def test_crash_is_told_and_the_next_call_works(self, function, how, worker):
        _, pid = worker.call("worker_helper:count")
        with pytest.raises(WorkerError, match=rf"The process {how}; its output is in .*worker.log"):
            worker.call(function)
        assert is_gone(pid)
        count, new_pid = worker.call("worker_helper:count")
        assert count == 1
        assert new_pid != pid
        assert worker.num_starts == 2

    def test_crash_tells_the_last_words_where_no_log_stays(self, helper):
        with Worker(helper / "words.log", keeps_log=False) as worker:
            with pytest.raises(WorkerError) as caught:
                worker.call("worker_helper:say_and_leave")
        assert str(caught.value) == (
            "The process ended with status 3; it printed last: check failed: x > 0."
        )

    def test_signal_without_a_name(self, worker):
        with pytest.raises(WorkerError, match="The process was ended by signal 40;"):
            worker.call("os:kill", worker.call("os:getpid"), 40)

    def test_end_between_calls_is_noticed(self, worker):
        _, pid = worker.call("worker_helper:count")
        os.kill(pid, signal.SIGKILL)
        wait_until_gone(pid)
        assert worker.call("worker_helper:count")[0] == 1


class TestLimits:
    def test_time(self, helper):
        with Worker(helper / "log", Limits(timeout_s=2)) as worker:
            _, pid = worker.call("worker_helper:count")
            with pytest.raises(WorkerError, match=r"took longer than 2 s.*`step_timeout_s`"):
                worker.call("worker_helper:hang")
            assert is_gone(pid)
            assert worker.call(ECHO, 1) == ((1,), {})

    def test_memory(self, helper):
        with Worker(helper / "log", Limits(memory_bytes=200 << 20)) as worker:
            _, pid = worker.call("worker_helper:count")
            with pytest.raises(WorkerError, match=r"more than 0.2 GiB.*`memory_limit_bytes`"):
                worker.call("worker_helper:grow", 400 << 20)
            assert is_gone(pid)
            assert worker.peak_bytes > 200 << 20
            assert worker.call(ECHO, 1) == ((1,), {})

    def test_worker_that_keeps_memory_is_replaced(self, worker, monkeypatch):
        monkeypatch.setattr(isolation, "GROWTH_BYTES", 50 << 20)
        small = [worker.call("worker_helper:hold", 5 << 20) for _ in range(3)]
        assert len(set(small)) == 1
        large = worker.call("worker_helper:hold", 80 << 20)
        assert large == small[0]
        assert is_gone(large)
        assert worker.call("worker_helper:hold", 5 << 20) != large
        assert worker.num_starts == 2

    def test_worker_that_keeps_state_is_not_replaced(self, helper, monkeypatch):
        monkeypatch.setattr(isolation, "GROWTH_BYTES", 50 << 20)
        with Worker(helper / "log", keeps_state=True) as worker:
            pids = [worker.call("worker_helper:hold", 80 << 20) for _ in range(2)]
        assert pids[0] == pids[1]
        assert worker.num_starts == 1

    def test_default_is_a_share_of_the_memory(self, helper, monkeypatch):
        monkeypatch.setattr(isolation, "MEMORY_SHARE", (200 << 20) / environment.memory_bytes())
        with Worker(helper / "log") as worker, pytest.raises(WorkerError, match=r"0.2 GiB"):
            worker.call("worker_helper:grow", 400 << 20)

    def test_exception_in_the_parent_ends_the_child(self, helper):
        with pytest.raises(KeyboardInterrupt), Worker(helper / "log") as worker:
            _, pid = worker.call("worker_helper:count")
            raise KeyboardInterrupt
        assert is_gone(pid)


class TestLog:
    def test_gets_everything_that_is_printed(self, worker, capfd):
        worker.call("worker_helper:speak")
        text = worker._log.read_text()
        for line in ("to the output", "to the errors", "from a library"):
            assert text.count(line) == 1
        captured = capfd.readouterr()
        assert captured.out == captured.err == ""

    def test_is_added_to(self, worker):
        worker.call("worker_helper:speak")
        worker.close()
        worker.call("worker_helper:speak")
        assert worker._log.read_text().count("to the output") == 2


class TestImportModules:
    def test_are_imported_before_the_first_call(self, helper):
        (helper / "own_ops.py").write_text("")
        with Worker(helper / "log", import_modules=["own_ops"]) as worker:
            assert worker.call("worker_helper:is_imported", "own_ops")

    def test_preloaded_ones_count_as_start_up(self, helper):
        (helper / "large_library.py").write_text("content = b'x' * (80 << 20)")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(isolation, "GROWTH_BYTES", 40 << 20)
            with Worker(helper / "log", preload=["large_library"]) as worker:
                assert worker.call("worker_helper:is_imported", "large_library")
                assert worker.call("worker_helper:count")[0] == 1
                assert worker.num_starts == 1

    def test_missing_ones_are_a_wrong_flag(self, helper):
        with Worker(helper / "log", import_modules=["no_such_ops"]) as worker:
            for _ in range(2):
                with pytest.raises(InputError, match=r"`import_modules=no_such_ops`"):
                    worker.call(ECHO)

    def test_broken_ones_too(self, helper):
        (helper / "broken_ops.py").write_text("raise RuntimeError('no such kernel')")
        with Worker(helper / "log", import_modules=["broken_ops"]) as worker:
            with pytest.raises(InputError, match=r"`import_modules=broken_ops`.*no such kernel"):
                worker.call(ECHO)


def run_script(folder, text, **options):
    (folder / "user_script.py").write_text(textwrap.dedent(text))
    return subprocess.Popen(
        [sys.executable, folder / "user_script.py"], stdout=subprocess.PIPE, text=True, **options
    )


class TestParent:
    def test_main_script_is_not_run_again(self, helper):
        """Without `if __name__ == "__main__"`, as scripts are written."""
        script = """
            from tfopt.isolation import Worker
            with open("runs.txt", "a") as file:
                file.write("once\\n")
            with Worker("log") as worker:
                print(worker.call("worker_helper:main_file"))
        """
        with run_script(helper, script, cwd=helper) as process:
            # Definitions of the script are received; the script itself is not its __main__.
            assert process.stdout.read().strip() == "None"
        assert process.returncode == 0
        assert (helper / "runs.txt").read_text() == "once\n"

    @pytest.mark.parametrize("function", ["worker_helper:echo", "worker_helper:hang"])
    def test_child_ends_with_a_parent_that_was_killed(self, function, helper):
        """While it waits for work, and in the middle of some."""
        script = f"""
            import time
            from tfopt.isolation import Worker
            worker = Worker("log")
            print(worker.call("os:getpid"), flush=True)
            worker.call({function!r})
            time.sleep(600)
        """
        with run_script(helper, script, cwd=helper) as process:
            child = int(process.stdout.readline())
            assert not is_gone(child)
            process.kill()
        wait_until_gone(child)


@pytest.mark.parametrize(("wanted", "found"), [(None, "1"), ("3", "1"), ("0", "0")])
def test_warnings_reach_the_log(tmp_path, monkeypatch, wanted, found):
    """They alone say why engines failed, whatever the user wants to see of TensorFlow."""
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    if wanted is not None:
        monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", wanted)
    monkeypatch.setenv("TF_FORCE_GPU_ALLOW_GROWTH", "false")
    with Worker(tmp_path / "log") as worker:
        assert worker.call("os:getenv", "TF_CPP_MIN_LOG_LEVEL") == found
        assert worker.call("os:getenv", "CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
        assert worker.call("os:getenv", "TF_FORCE_GPU_ALLOW_GROWTH") == "false"
