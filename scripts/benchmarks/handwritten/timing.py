"""What the four by-hand scripts share when each is run alone: flags, data and interleaved timing.

Nothing of this is used when a benchmark imports their `convert` and `open_runner`.
"""

import pathlib
import sys
import time
from collections.abc import Callable

import numpy as np
from absl import app, flags

_MODEL = flags.DEFINE_string("model", None, "SavedModel exported by Keras 3.", required=True)
_DATA = flags.DEFINE_string(
    "data", None, "npz with x_train and x_test, for a model with one input.", required=True
)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Where to put the models.", required=True)
_NUM_THREADS = flags.DEFINE_integer("num_threads", 2, "Threads of one inference.", lower_bound=1)

_NUM_CALIBRATION_EXAMPLES = 200
_NUM_TIMED_EXAMPLES = 20
_NUM_WARM_UPS = 3
_NUM_ROUNDS = 15


def read_input(saved_model: pathlib.Path) -> tuple[str, np.dtype]:
    """Returns the name and dtype of the one input of `serving_default`, without loading it."""
    import tensorflow as tf
    from tensorflow.core.protobuf import saved_model_pb2

    proto = saved_model_pb2.SavedModel.FromString((saved_model / "saved_model.pb").read_bytes())
    inputs = dict(proto.meta_graphs[0].signature_def["serving_default"].inputs)
    if len(inputs) != 1:
        raise ValueError(f"expected a model with one input, got {sorted(inputs)}")
    [(name, info)] = inputs.items()
    return name, np.dtype(tf.as_dtype(info.dtype).as_numpy_dtype)


def time_interleaved(
    runners: dict[str, Callable], examples: list[dict[str, np.ndarray]]
) -> dict[str, float]:
    """Returns the median milliseconds of each runner.

    The runners take turns, in another order every round, so that a slow moment of the machine
    hits all of them. Each starts its turn with untimed calls, while the threads of the one
    before it go to sleep: taking turns call by call would slow all of them down.
    """
    times_ms = {name: [] for name in runners}
    random = np.random.default_rng(0)
    for _ in range(_NUM_ROUNDS):
        for name in random.permutation(list(runners)):
            for example in examples[:_NUM_WARM_UPS]:
                runners[name](example)
            for example in examples:
                start = time.perf_counter()
                runners[name](example)
                times_ms[name].append((time.perf_counter() - start) * 1e3)
    return {name: float(np.median(times)) for name, times in times_ms.items()}


def _first_output(outputs: dict | list) -> np.ndarray:
    return outputs[0] if isinstance(outputs, list) else next(iter(outputs.values()))


def main(convert: Callable, open_runner: Callable) -> None:
    """Parses the flags, converts, times every version and prints a table."""

    def run(_: list[str]) -> int:
        model, folder = pathlib.Path(_MODEL.value), pathlib.Path(_OUTPUT_DIR.value)
        input_name, dtype = read_input(model)
        with np.load(_DATA.value) as data:
            calibration, examples = (
                [{input_name: x[None]} for x in data[key][:count].astype(dtype)]
                for key, count in (
                    ("x_train", _NUM_CALIBRATION_EXAMPLES),
                    ("x_test", _NUM_TIMED_EXAMPLES),
                )
            )
        names = convert(model, calibration, folder)
        if not names:
            print("No conversion worked.")
            return 1
        runners = {name: open_runner(folder, name, _NUM_THREADS.value) for name in names}
        outputs = {
            name: np.concatenate([_first_output(runner(x)) for x in examples])
            for name, runner in runners.items()
        }
        medians_ms = time_interleaved(runners, examples)
        print(f"{'version':24} {'median ms':>10} {'max difference from ' + names[0]:>32}")
        for name in names:
            difference = np.abs(outputs[name] - outputs[names[0]]).max()
            print(f"{name:24} {medians_ms[name]:10.3f} {difference:32.3g}")
        return 0

    run_app(run)


def run_app(main: Callable) -> None:
    """Runs absl's app; --help ends with 0."""
    try:
        app.run(main)
    except SystemExit as end:
        is_help = any(argument in ("--help", "-h", "--helpfull") for argument in sys.argv[1:])
        sys.exit(0 if is_help else end.code)
