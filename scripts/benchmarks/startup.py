"""Processor time of starting tfopt.

Targets: `tfopt --help` costs at most 0.3 s and `python -c "import tfopt"` at most 0.2 s of
processor time (user and system together, nothing subtracted; the median of 11 runs each, in turns).
`python -c pass` stands beside them to show what Python itself costs here.

    python scripts/benchmarks/startup.py --output=startup.json
"""

import pathlib
import resource
import statistics
import subprocess
import sys
import sysconfig
import time

import reporting
from absl import flags

_OUTPUT = reporting.define_output()
_RUNS = flags.DEFINE_integer("runs", 11, "Runs of each command.", lower_bound=1)

_TFOPT = str(pathlib.Path(sysconfig.get_path("scripts"), "tfopt"))
_COMMANDS = {
    "tfopt --help": ([_TFOPT, "--help"], 0.3),
    'python -c "import tfopt"': ([sys.executable, "-c", "import tfopt"], 0.2),
    "python -c pass": ([sys.executable, "-c", "pass"], None),
}


def _run(command: list[str]) -> tuple[float, float]:
    """Returns processor and wall seconds."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall_s, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, wall_s


def main(_: list[str]) -> None:
    """Runs the commands in turns."""
    runs = {name: [] for name in _COMMANDS}
    for _ in range(_RUNS.value):
        for name, (command, _) in _COMMANDS.items():
            runs[name].append(_run(command))
    rows = [("command", "cpu s", "lowest", "highest", "wall s", "target s", "")]
    results = []
    for name, (_, target_s) in _COMMANDS.items():
        cpu_s, wall_s = zip(*runs[name], strict=True)
        median_s = statistics.median(cpu_s)
        is_met = None if target_s is None else median_s <= target_s
        results.append(
            {
                "command": name,
                "median_cpu_s": median_s,
                "target_s": target_s,
                "is_met": is_met,
                "cpu_s": cpu_s,
                "wall_s": wall_s,
            }
        )
        rows.append(
            (
                name,
                f"{median_s:.3f}",
                f"{min(cpu_s):.3f}",
                f"{max(cpu_s):.3f}",
                f"{statistics.median(wall_s):.3f}",
                target_s,
                None if is_met is None else reporting.met(is_met),
            )
        )
    print(reporting.format_table(rows))
    reporting.save(_OUTPUT.value, {"benchmark": "startup", "results": results})


if __name__ == "__main__":
    reporting.run_app(main)
