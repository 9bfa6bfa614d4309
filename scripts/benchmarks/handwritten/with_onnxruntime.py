"""By hand with ONNX Runtime: tf2onnx, then static quantization as documented for x86 with VNNI.

python with_onnxruntime.py --model=SAVED_MODEL --data=FILE.npz --output_dir=DIR --num_threads=2
"""

import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quant_pre_process,
    quantize_static,
)

_OPSET = 18  # the newest that tf2onnx writes


class _Reader(CalibrationDataReader):
    """Hands the calibration batches to ONNX Runtime."""

    def __init__(self, calibration: list[dict[str, np.ndarray]]) -> None:
        self._batches: Iterator[dict[str, np.ndarray]] = iter(calibration)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Returns the next batch, or None at the end."""
        return next(self._batches, None)


def _convert_float32(saved_model: pathlib.Path, path: pathlib.Path) -> None:
    """Runs tf2onnx, which freezes the signature, and checks the file: it may exit 0 in vain."""
    command = [sys.executable, "-m", "tf2onnx.convert", "--saved-model", str(saved_model)]
    command += ["--signature_def", "serving_default", "--opset", str(_OPSET), "--output", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-1000:])
    onnx.checker.check_model(path, full_check=True)
    onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def convert(
    saved_model: pathlib.Path, calibration: list[dict[str, np.ndarray]], folder: pathlib.Path
) -> list[str]:
    """Writes `<name>.onnx` for every conversion that works and returns the names.

    Activations are uint8 and weights int8: the pair that VNNI multiplies. (A CPU without VNNI
    would want `reduce_range=True`.)
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    try:
        _convert_float32(saved_model, folder / "float32.onnx")
        names.append("float32")
        quant_pre_process(folder / "float32.onnx", folder / "preprocessed.onnx")
    except Exception as error:
        print(f"onnxruntime {'int8' if names else 'float32'}: skipped, {error}")
        return names
    for name, per_channel in (("int8", True), ("int8_per_tensor", False)):
        try:
            quantize_static(
                folder / "preprocessed.onnx",
                folder / f"{name}.onnx",
                _Reader(calibration),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=per_channel,
            )
        except Exception as error:
            print(f"onnxruntime {name}: skipped, {error}")
            continue
        names.append(name)
    return names


def open_runner(
    folder: pathlib.Path, name: str, num_threads: int
) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
    """Loads `<name>.onnx` and returns a function that runs one inference."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"]
    )

    def run(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return session.run(None, inputs)

    return run


if __name__ == "__main__":
    import timing

    timing.main(convert, open_runner)
