"""What `session.run` costs beyond the bare call of the runtime.

Target: at most 20 µs, on each of TensorFlow, LiteRT, ONNX Runtime and OpenVINO.

A tiny dense Keras model is converted by `tfopt.convert` to `float32` on each runtime and loaded by
`tfopt.load`. The same files are loaded by hand with the same settings, and blocks of both kinds of
calls alternate in random order, in one process for each runtime. The bare call is what the
runtime's own documentation shows:

    tensorflow   signature(**{name: tf.constant(array)}), then .numpy() of each output
    litert       set_tensor, invoke, get_tensor
    onnxruntime  session.run(None, arrays)
    openvino     request.infer(arrays) of a model compiled for this shape; it returns copies

The difference is that of the medians over all calls. Its 95 % interval is a bootstrap over pairs
of blocks.

    python scripts/benchmarks/session_overhead.py --output=session_overhead.json
"""

import pathlib
import tempfile
import time
from collections.abc import Callable

import example_models
import numpy as np
import reporting
from absl import flags

import tfopt

_OUTPUT = reporting.define_output()
_NUM_BLOCKS = flags.DEFINE_integer("num_blocks", 100, "Blocks of each kind.", lower_bound=10)
_CALLS = flags.DEFINE_integer("calls_per_block", 200, "Timed calls of a block.", lower_bound=1)
_NUM_THREADS = flags.DEFINE_integer("num_threads", 1, "Threads of the runtime.", lower_bound=1)
_RUNTIMES = flags.DEFINE_list(
    "runtimes", ["tensorflow", "litert", "onnxruntime", "openvino"], "Which to measure."
)

_TARGET_US = 20.0
_NUM_SETTLING_CALLS = 20
_NUM_RESAMPLES = 1000
_NUM_FEATURES = 16

Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], object]


def _export(folder: pathlib.Path) -> None:
    import keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((_NUM_FEATURES,), name="features"),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(4),
        ]
    )
    model.export(str(folder), format="tf_saved_model", verbose=False)


def _open_tensorflow(artifact: tfopt.Artifact, num_threads: int) -> Run:
    import tensorflow as tf

    del num_threads  # of the whole process; tfopt.load has set it
    loaded = tf.saved_model.load(artifact.folder / "saved_model")
    signature = loaded.signatures[artifact.signature.key]

    def run(inputs: Arrays) -> Arrays:
        outputs = signature(**{name: tf.constant(value) for name, value in inputs.items()})
        return {name: value.numpy() for name, value in outputs.items()}

    run.loaded = loaded  # the signature does not keep the variables alive
    return run


def _open_litert(artifact: tfopt.Artifact, num_threads: int) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(artifact.folder / "model.tflite"), num_threads=num_threads)
    interpreter.allocate_tensors()
    runner = interpreter.get_signature_runner("serving_default")
    inputs = [(name, item["index"]) for name, item in runner.get_input_details().items()]
    outputs = [(name, item["index"]) for name, item in runner.get_output_details().items()]

    def run(arrays: Arrays) -> Arrays:
        for name, index in inputs:
            interpreter.set_tensor(index, arrays[name])
        interpreter.invoke()
        return {name: interpreter.get_tensor(index) for name, index in outputs}

    return run


def _open_onnxruntime(artifact: tfopt.Artifact, num_threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        artifact.folder / "model.onnx", options, providers=["CPUExecutionProvider"]
    )

    def run(arrays: Arrays) -> list[np.ndarray]:
        return session.run(None, arrays)

    return run


def _open_openvino(artifact: tfopt.Artifact, num_threads: int) -> Run:
    import openvino

    core = openvino.Core()
    model = core.read_model(artifact.folder / "model.xml")
    inputs = artifact.signature.with_batch_size(1).inputs
    model.reshape({spec.name: list(spec.shape) for spec in inputs})
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": num_threads,
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(arrays: Arrays) -> object:
        return request.infer(arrays)

    return run


_OPEN = {
    "tensorflow": _open_tensorflow,
    "litert": _open_litert,
    "onnxruntime": _open_onnxruntime,
    "openvino": _open_openvino,
}


def _values(outputs: object) -> np.ndarray:
    items = outputs if isinstance(outputs, list) else list(outputs.values())
    return items[0]


def _time(
    folder: pathlib.Path, runtime: str, num_threads: int, num_blocks: int, num_calls: int
) -> dict[str, list[list[float]]]:
    """Returns blocks of seconds of `session` and `bare`; runs in a process of its own."""
    random = np.random.default_rng(0)
    artifact = tfopt.Artifact.open(folder)
    [spec] = artifact.signature.inputs
    inputs = {spec.name: random.normal(size=(1, _NUM_FEATURES)).astype(np.float32)}
    blocks: dict[str, list[list[float]]] = {"session": [], "bare": []}
    with tfopt.load(folder, num_threads) as session:
        runs = {"session": session.run, "bare": _OPEN[runtime](artifact, num_threads)}
        np.testing.assert_array_equal(*(_values(run(inputs)) for run in runs.values()))
        clock = time.perf_counter
        for run in runs.values():
            for _ in range(10 * _NUM_SETTLING_CALLS):
                run(inputs)
        for _ in range(num_blocks):
            for name in random.permutation(list(runs)):
                run = runs[name]
                for _ in range(_NUM_SETTLING_CALLS):
                    run(inputs)
                times = []
                for _ in range(num_calls):
                    begin = clock()
                    run(inputs)
                    times.append(clock() - begin)
                blocks[name].append(times)
    return blocks


def _difference_us(blocks: dict[str, list[list[float]]]) -> tuple[float, float, float]:
    """Returns the difference of the medians and its 95 % interval."""
    session, bare = (np.array(blocks[name]) * 1e6 for name in ("session", "bare"))
    random = np.random.default_rng(0)
    resampled = []
    for _ in range(_NUM_RESAMPLES):
        drawn = random.integers(len(session), size=len(session))
        resampled.append(np.median(session[drawn]) - np.median(bare[drawn]))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(np.median(session) - np.median(bare)), float(low), float(high)


def main(_: list[str]) -> None:
    """Converts, times and prints."""
    rows = [("runtime", "bare µs", "session µs", "more µs", "95 % interval", "target µs", "")]
    results = []
    with tempfile.TemporaryDirectory(prefix="session-overhead-") as name:
        folder = pathlib.Path(name)
        example_models.in_child(_export, folder / "model")
        for runtime in _RUNTIMES.value:
            artifact = folder / runtime
            tfopt.convert(folder / "model", f"float32@{runtime}", artifact)
            blocks = example_models.in_child(
                _time, artifact, runtime, _NUM_THREADS.value, _NUM_BLOCKS.value, _CALLS.value
            )
            medians_us = {key: float(np.median(value)) * 1e6 for key, value in blocks.items()}
            difference, low, high = _difference_us(blocks)
            is_met = difference <= _TARGET_US
            results.append(
                {
                    "runtime": runtime,
                    "bare_us": medians_us["bare"],
                    "session_us": medians_us["session"],
                    "difference_us": difference,
                    "difference_low_us": low,
                    "difference_high_us": high,
                    "target_us": _TARGET_US,
                    "is_met": is_met,
                    "blocks_s": blocks,
                }
            )
            rows.append(
                (
                    runtime,
                    f"{medians_us['bare']:.1f}",
                    f"{medians_us['session']:.1f}",
                    f"{difference:.2f}",
                    f"{low:.2f} to {high:.2f}",
                    f"{_TARGET_US:g}",
                    reporting.met(is_met),
                )
            )
    print(reporting.format_table(rows))
    reporting.save(
        _OUTPUT.value,
        {"benchmark": "session_overhead", "num_threads": _NUM_THREADS.value, "results": results},
    )


if __name__ == "__main__":
    reporting.run_app(main)
