"""By hand with OpenVINO: float32, bfloat16, and int8 by NNCF, tuned for latency.

python with_openvino.py --model=SAVED_MODEL --data=FILE.npz --output_dir=DIR --num_threads=2
"""

import pathlib
from collections.abc import Callable

import numpy as np
import openvino as ov

# Activations other than ReLU, for which NNCF's documentation recommends the preset MIXED
# (asymmetric activations). Keras's exact gelu arrives as "Erf".
_NON_RELU = {"Elu", "Erf", "Gelu", "HSwish", "Mish", "PRelu", "Swish", "Selu"}


def _quantize(model: ov.Model, calibration: list[dict[str, np.ndarray]]) -> ov.Model:
    """Quantizes with NNCF's defaults, except where its documentation says otherwise."""
    import nncf  # a process that serves does not need it

    types = [op.get_type_name() for op in model.get_ops()]
    is_transformer = "ScaledDotProductAttention" in types or types.count("Softmax") > 1
    return nncf.quantize(
        model,
        nncf.Dataset(calibration),
        subset_size=len(calibration),
        preset=nncf.QuantizationPreset.MIXED if _NON_RELU & set(types) else None,
        model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
    )


def convert(
    saved_model: pathlib.Path, calibration: list[dict[str, np.ndarray]], folder: pathlib.Path
) -> list[str]:
    """Writes `float32.xml` and `int8.xml` and returns the names of the versions to run.

    The shapes are fixed to those of a calibration batch, as OpenVINO's documentation advises.
    bfloat16 is a way of running either file, on a CPU that has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    has_bfloat16 = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    names = []
    try:
        model = ov.convert_model(saved_model)
        model.reshape({name: list(value.shape) for name, value in calibration[0].items()})
        ov.save_model(model, folder / "float32.xml", compress_to_fp16=False)
    except Exception as error:
        print(f"openvino float32: skipped, {error}")
        return names
    names += ["float32"] + ["bfloat16"] * has_bfloat16
    try:
        ov.save_model(_quantize(model, calibration), folder / "int8.xml", compress_to_fp16=False)
    except Exception as error:
        print(f"openvino int8: skipped, {error}")
        return names
    return names + ["int8"] + ["int8_bfloat16"] * has_bfloat16


def open_runner(
    folder: pathlib.Path, name: str, num_threads: int
) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Compiles the model and returns a function that runs one inference.

    The precision is always set: where the CPU has bfloat16, it would be the default.
    """
    weights, precision = {
        "float32": ("float32", "f32"),
        "bfloat16": ("float32", "bf16"),
        "int8": ("int8", "f32"),
        "int8_bfloat16": ("int8", "bf16"),
    }[name]
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": num_threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": precision,
    }
    compiled = ov.Core().compile_model(folder / f"{weights}.xml", "CPU", settings)
    output_names = [output.any_name for output in compiled.outputs]
    request = compiled.create_infer_request()

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = request.infer(inputs, share_inputs=True)
        return {name: outputs[i] for i, name in enumerate(output_names)}

    return run


if __name__ == "__main__":
    import timing

    timing.main(convert, open_runner)
