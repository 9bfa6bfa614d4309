"""Runs library functions in a child process that may crash, hang or grow without harm.

A worker stays warm between calls, since importing TensorFlow costs seconds. It is no
`multiprocessing` child: that would run the user's training script again in every child. What the
script defines is sent instead (`tfopt.main_module`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from tfopt import main_module
from tfopt.errors import MAX_REASON, ConversionError, InputError, ResultError, first_line
from tfopt.measure import environment

POLL_S = 0.1
DEFAULT_TIMEOUT_S = 1800.0
MEMORY_SHARE = 0.8  # of the machine's memory, for one worker
LOOK_BACK_BYTES = 4096
MAX_WORDS = 300  # characters of the last line that a child printed
GROWTH_BYTES = 2 << 30  # a worker that holds this much more than after its start is replaced


class WorkerError(ConversionError):
    """A call crashed, hung or outgrew its limits; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one call may use.

    Attributes:
      timeout_s: seconds of wall time.
      memory_bytes: resident memory; None is 80 % of what the machine or container has.
    """

    timeout_s: float = DEFAULT_TIMEOUT_S
    memory_bytes: int | None = None


class Worker:
    """A child process that calls functions by name; started at the first call.

    Args:
      log: file that gets everything the child prints.
      limits: for each call.
      import_modules: modules that register TensorFlow custom ops; imported at the start.
      preload: modules that the functions need anyway; importing them counts as start-up.
      keeps_state: whether functions leave something behind that later ones need, such as an open
        session; then the child is not replaced when it has grown.
      keeps_log: whether the log is there for the user later, so that messages may name it; else
        they tell what the child printed last.
    """

    def __init__(
        self,
        log: str | Path,
        limits: Limits | None = None,
        import_modules: Sequence[str] = (),
        preload: Sequence[str] = (),
        keeps_state: bool = False,
        keeps_log: bool = True,
    ):
        self._log, self._keeps_log = Path(log), keeps_log
        self._limits = limits or Limits()
        self._import_modules = tuple(import_modules)
        self._preload = tuple(preload)
        self._keeps_state = keeps_state
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._memory_at_start = 0
        self.startup_s = 0.0
        self.num_starts = 0
        self.peak_bytes = 0

    def call(self, function: str, /, *args: Any, **kwargs: Any) -> Any:
        """Calls `package.module:function` in the child and returns its result.

        Raises:
          InputError, ConversionError, ResultError: as the function raised them.
          WorkerError: when the child crashed or passed a limit, or the function raised
            anything else; the next call starts a new child.
        """
        self._start()
        assert self._connection is not None
        try:
            self._connection.send((function, args, kwargs))
            is_error, value = self._wait()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise self._crashed() from None
        except BaseException:
            self.close(kill=True)
            raise
        process = self._process
        assert process is not None
        grown = environment.resident_bytes(process.pid) - self._memory_at_start
        if grown > GROWTH_BYTES and not self._keeps_state:
            self.close()
        if is_error:
            raise value
        return value

    def close(self, kill: bool = False) -> None:
        """Ends the child; it is started again by the next call."""
        if self._process is None:
            return
        self.peak_bytes = max(self.peak_bytes, environment.peak_resident_bytes(self._process.pid))
        if self._connection is not None:
            self._connection.close()
        if not kill:
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                kill = True
        if kill:
            # The child leads a session of its own: its children go with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = self._connection = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.close(kill=error is not None)

    def _start(self) -> None:
        if self._process is not None and self._connection is not None:
            # Between calls the child says nothing: something to read is its end.
            if self._process.poll() is None and not self._connection.poll():
                return
            self.close(kill=True)
        begin = time.perf_counter()
        ours, theirs = Pipe()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        # A child of its own session does not get the terminal's Ctrl-C: the parent decides.
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tfopt.isolation", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={
                    # TensorFlow takes all memory of a GPU when it starts, which leaves none for
                    # the other workers; and what a model needs could not be told.
                    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
                    # CUDA numbers GPUs by speed, nvidia-smi by their slots.
                    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
                    **os.environ,
                    # Only warnings say why engines failed; they go to the log.
                    "TF_CPP_MIN_LOG_LEVEL": _log_level(os.environ.get("TF_CPP_MIN_LOG_LEVEL")),
                    "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
                },
            )
        theirs.close()
        self._connection = ours
        ours.send((self._preload, self._import_modules, main_module.pack()))
        try:
            is_error, value = self._wait()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise self._crashed() from None
        except BaseException:
            self.close(kill=True)
            raise
        if is_error:
            self.close(kill=True)
            raise value
        self._memory_at_start = environment.resident_bytes(self._process.pid)
        self.startup_s += time.perf_counter() - begin
        self.num_starts += 1

    def _wait(self) -> tuple[bool, Any]:
        assert self._connection is not None and self._process is not None
        limit = self._limits.memory_bytes or int(environment.memory_bytes() * MEMORY_SHARE)
        deadline = time.monotonic() + self._limits.timeout_s
        while not self._connection.poll(POLL_S):
            if environment.resident_bytes(self._process.pid) > limit:
                self.close(kill=True)
                raise WorkerError(
                    f"It held more than {limit / 2**30:.1f} GiB of memory and was stopped; the "
                    "limit is `memory_limit_bytes`."
                )
            if time.monotonic() > deadline:
                self.close(kill=True)
                raise WorkerError(
                    f"It took longer than {self._limits.timeout_s:g} s and was stopped; the limit "
                    "is `step_timeout_s`."
                )
        return self._connection.recv()

    def _crashed(self) -> WorkerError:
        assert self._process is not None
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = 0
        how = f"ended with status {code}"
        if code < 0:
            known = {int(item): item.name for item in signal.Signals}
            how = f"was ended by {known.get(-code, f'signal {-code}')}"
        self.close(kill=True)
        told = f"; its output is in {self._log}" if self._keeps_log else self._last_words()
        return WorkerError(f"The process {how}{told}.")

    def _last_words(self) -> str:
        """What the child printed last, for a message."""
        try:
            with self._log.open("rb") as file:
                file.seek(max(0, self._log.stat().st_size - LOOK_BACK_BYTES))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:  # the user may have deleted it
            return ""
        words = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"; it printed last: {words[:MAX_WORDS].rstrip('.')}" if words else ""


def _serve(connection: Connection) -> None:
    """The child's loop: call what comes in, send back what comes out."""
    _end_with_parent(os.getppid())
    known = (InputError, ConversionError, ResultError)
    preload, import_modules, definitions = connection.recv()
    main_module.install(*definitions)
    for module in preload:
        importlib.import_module(module)
    for module in import_modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # ops that do not load raise errors of TensorFlow
            reason = f"`import_modules={module}` cannot be imported ({_reason(error)})."
            connection.send((True, InputError(reason)))
            return
    connection.send((False, None))
    while True:
        try:
            function, args, kwargs = connection.recv()
        except EOFError:
            return
        try:
            result = (False, find_function(function)(*args, **kwargs))
        except known as error:
            kind = next(k for k in known if isinstance(error, k))
            result = (True, kind(str(error)))
        except Exception as error:  # whatever a converter raises becomes a row with its reason
            import traceback

            traceback.print_exc()
            result = (True, WorkerError(_reason(error)))
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send(result)


def _log_level(wanted: str | None) -> str:
    """Of TensorFlow in a child: what the user wants, warnings at least."""
    return "0" if wanted == "0" else "1"


def _reason(error: Exception) -> str:
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line[:MAX_REASON]}"


def find_function(name: str) -> Callable[..., Any]:
    """The function that `package.module:function` names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _end_with_parent(parent: int) -> None:
    """Ends this process soon after its parent is gone, also in the middle of a conversion."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    # The functions that this process calls must meet the same classes as their modules.
    from tfopt import isolation

    isolation._serve(Connection(int(sys.argv[1])))
