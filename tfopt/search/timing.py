"""How long a search times what it compares, and what it keeps of that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tfopt.measure import environment, latency
from tfopt.search.options import Options
from tfopt.search.remote import RemoteSession, Timed, time_side_by_side
from tfopt.search.run import Run

FINAL_TIMES = 2  # as long as other timings, for each finalist
FINAL_BLOCK_S = 0.15  # at most: long blocks are closer to a server under load
NUM_ROUNDS = 25  # for which there must be time


def time_sessions(
    run: Run,
    options: Options,
    name: str,
    sessions: Mapping[str, RemoteSession],
    is_final: bool = False,
) -> Timed:
    """Times open sessions side by side and writes the raw times to disk.

    Args:
      run: the search.
      options: say for how long.
      name: of the file.
      sessions: by name; the first is what the others are compared with.
      is_final: whether these times decide.
    """
    each_s, block_s = options.max_timing_s, latency.BLOCK_S
    if is_final:
        each_s, block_s = FINAL_TIMES * each_s, FINAL_BLOCK_S
    # A round takes a block and as long before it of each.
    block_s = min(block_s, each_s / (2 * NUM_ROUNDS))
    load_before = environment.load_average()
    timed = time_side_by_side(
        sessions,
        seed=run.seed,
        max_s=each_s * max(1, len(sessions) - 1),
        interval_width=options.interval_width,
        block_s=block_s,
        num_threads=run.num_threads,
    )
    path = run.timing_file(name)
    path.parent.mkdir(exist_ok=True)
    value = {
        "environment": environment.describe(),
        "load_average_1min_before": load_before,
        "batch_size": run.batch_size,
        "num_threads": run.num_threads,
        **timed.to_json(),
    }
    path.write_text(json.dumps(value))
    return timed


def figures(timed: Timed, baseline: str, name: str, file: str) -> dict[str, Any]:
    """What the table says of a session's times, and where the raw ones are."""
    return {
        **timed.figures(baseline, name),
        "steal_share": timed.timings[name].steal_share,
        "notes": timed.notes[name],
        "timing": {"file": f"timings/{file}.json", "key": name},
    }
