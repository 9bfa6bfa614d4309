"""A program `nvidia-smi` for machines without one, which answers as real GPUs did.

The values are from captures that owners of these GPUs made
(https://github.com/utkuozdemir/nvidia_gpu_exporter, `internal/captures` and `samples`).
"""

import json
import os
import sys
from pathlib import Path

H200_IDLE = {
    "name": "NVIDIA H200",
    "driver_version": "580.173.02",
    "compute_cap": "9.0",
    "persistence_mode": "Enabled",
    "clocks_event_reasons.active": "0x0000000000000001",
    "memory.total": "143771 MiB",
    "memory.used": "0 MiB",
    "utilization.gpu": "0 %",
    "ecc.mode.current": "Enabled",
    "temperature.gpu": "37",
    "power.draw": "85.12 W",
    "power.limit": "700.00 W",
    "clocks.current.sm": "345 MHz",
    "clocks.current.memory": "3201 MHz",
    "clocks.max.sm": "1980 MHz",
    "clocks.max.memory": "3201 MHz",
    "mig.mode.current": "Disabled",
}
H200_IN_PARTS = {
    **H200_IDLE,
    "memory.used": "44 MiB",
    "utilization.gpu": "[N/A]",
    "power.draw": "89.93 W",
    "mig.mode.current": "Enabled",
}
RTX_4080_UNDER_LOAD = {
    "name": "NVIDIA GeForce RTX 4080 SUPER",
    "driver_version": "595.71.05",
    "compute_cap": "8.9",
    "persistence_mode": "Disabled",
    "clocks_event_reasons.active": "0x0000000000000000",
    "memory.total": "16376 MiB",
    "memory.used": "1474 MiB",
    "utilization.gpu": "7 %",
    "ecc.mode.current": "[N/A]",
    "temperature.gpu": "46",
    "power.draw": "84.24 W",
    "power.limit": "320.00 W",
    "clocks.current.sm": "2805 MHz",
    "clocks.current.memory": "11251 MHz",
    "clocks.max.sm": "3165 MHz",
    "clocks.max.memory": "11501 MHz",
    "mig.mode.current": "[N/A]",
}
RTX_2080_OF_DRIVER_465 = {
    "name": "NVIDIA GeForce RTX 2080 SUPER",
    "driver_version": "465.27",
    "persistence_mode": "Disabled",
    "clocks_throttle_reasons.active": "0x0000000000000001",
    "memory.total": "7979 MiB",
    "memory.used": "344 MiB",
    "utilization.gpu": "0 %",
    "ecc.mode.current": "[N/A]",
    "temperature.gpu": "32",
    "power.draw": "30.37 W",
    "power.limit": "250.00 W",
    "clocks.current.sm": "300 MHz",
    "clocks.current.memory": "405 MHz",
    "clocks.max.sm": "2145 MHz",
    "clocks.max.memory": "7751 MHz",
    "mig.mode.current": "[N/A]",
}


def install(folder, monkeypatch, *states, processes=()):
    """Puts the program on the PATH.

    Args:
      folder: gets the program.
      monkeypatch: pytest's.
      *states: what `--query-gpu` answers when it is asked for clocks, the last one ever after;
        to other questions it is always the last.
      processes: what `--query-compute-apps` answers: process and memory; `asking` stands for the
        process that asks.
    """
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    folder.mkdir(exist_ok=True)
    (folder / "answers.json").write_text(json.dumps({"states": states, "processes": processes}))
    program = folder / "nvidia-smi"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {__file__} {folder} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def questions(folder):
    """What the program was asked, in order."""
    file = folder / "questions.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _main(folder, arguments):
    options = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    answers = json.loads(Path(folder, "answers.json").read_text())
    with Path(folder, "questions.jsonl").open("a+") as file:
        file.write(json.dumps(arguments) + "\n")
        file.seek(0)
        count = sum("clocks.current.sm" in line for line in file)
    assert options.pop("format") == "csv,noheader,nounits"
    if options.pop("id", "0") != "0":
        sys.exit("No devices were found")
    ((query, fields),) = options.items()
    if query == "query-compute-apps":
        rows = [
            {"pid": str(os.getppid()) if pid == "asking" else str(pid), "used_memory": memory}
            for pid, memory in answers["processes"]
        ]
    else:
        states = answers["states"]
        is_state = "clocks.current.sm" in fields
        rows = [states[min(max(count, 1), len(states)) - 1 if is_state else -1]]
    for field in fields.split(","):
        for row in rows:
            if field not in row:
                print(f'Field "{field}" is not a valid field to query.\n')
                sys.exit(2)
    for row in rows:
        values = [row[field] for field in fields.split(",")]
        units = (" MiB", " MHz", " W", " %")
        print(", ".join(v.rsplit(" ", 1)[0] if v.endswith(units) else v for v in values))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2:])
