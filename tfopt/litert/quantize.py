"""Quantizes `.tflite` files with LiteRT Quantizer.

Inputs and outputs stay as they are, unless int8 ones are asked for
(https://github.com/google-ai-edge/LiteRT/tree/main/litert_quantizer).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import numpy as np

from tfopt.errors import MAX_REASON, ConversionError, first_line
from tfopt.litert import flatbuffer

PACKAGE = "litert-quantizer"
_LARGEST = 3e38
_LOOPS = {"CALL_ONCE", "IF", "STABLEHLO_WHILE", "WHILE"}


def quantize(
    content: bytes,
    precision: str,
    batches: Iterable[dict[str, np.ndarray]] = (),
    int8_inputs: bool = False,
    int8_outputs: bool = False,
) -> bytes:
    """Quantizes a file with weights in float32 or float16.

    Args:
      content: of the file, with one signature or none.
      precision: `float16`, `dynamic_range`, `int8` or `int16x8`.
      batches: inputs to calibrate with, for int8 and int16x8; each tensor gets the range between
        the lowest and the highest value that it held.
      int8_inputs: whether inputs become int8; else they stay as they are.
      int8_outputs: whether outputs become int8; else they stay as they are.

    Raises:
      ConversionError: when LiteRT Quantizer is not installed or cannot take the file, or the file
        is quantized already.
    """
    if importlib.util.find_spec("litert_quantizer") is None:
        raise ConversionError(
            f"{PACKAGE} quantizes .tflite files and is not installed; pip install {PACKAGE}."
        )
    from litert_quantizer.quantizer import Quantizer

    content = flatbuffer.with_float32_weights(content)
    model = flatbuffer.read(content)
    if found := list(flatbuffer.quantized_tensors(model)):
        kinds = sorted({flatbuffer.type_name(tensor).lower() for tensor in found})
        raise ConversionError(
            f"The file is quantized already ({len(found)} of its tensors are {'/'.join(kinds)}); "
            "give the float32 model that it was made from."
        )
    ops = {flatbuffer.op_name(model, operator) for subgraph in model.subgraphs
           for operator in subgraph.operators or []}  # fmt: skip
    if "READ_VARIABLE" in ops:
        raise ConversionError(
            "The file keeps weights in variables (READ_VARIABLE), which LiteRT Quantizer leaves "
            "as they are; give the SavedModel or Keras model that it was made from."
        )
    content = flatbuffer.with_signature(content)
    quantizer = Quantizer(content, _recipe(precision, int8_inputs, int8_outputs))
    try:
        ranges = None
        if quantizer.need_calibration:
            if loops := sorted(ops & _LOOPS):
                raise ConversionError(
                    f"LiteRT Quantizer cannot calibrate models with {' and '.join(loops)}; "
                    "dynamic_range and float16 work."
                )
            ranges = _ranges(content, batches)
        made = quantizer.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    except ConversionError:
        raise
    except Exception as error:  # it raises bare exceptions of many kinds
        reason = first_line(error)[:MAX_REASON]
        raise ConversionError(f"LiteRT Quantizer refused: {reason}") from error
    quantized = bytes(made.quantized_model)
    if not any(flatbuffer.quantized_tensors(flatbuffer.read(quantized))):
        raise ConversionError(
            "LiteRT Quantizer found no layer to quantize, such as a convolution or a matrix "
            "product."
        )
    return quantized


def _recipe(precision: str, int8_inputs: bool, int8_outputs: bool) -> list[dict[str, Any]]:
    from litert_quantizer import qtyping
    from litert_quantizer.algorithm_manager import AlgorithmName
    from litert_quantizer.recipe_manager import RecipeManager

    manager, ops = RecipeManager(), qtyping.TFLOperationName
    if precision == "float16":
        weights = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
        manager.add_quantization_config(
            ".*",
            ops.ALL_SUPPORTED,
            qtyping.OpQuantizationConfig(
                weight_tensor_config=weights, compute_precision=qtyping.ComputePrecision.FLOAT
            ),
            AlgorithmName.FLOAT_CASTING,
        )
    elif precision == "dynamic_range":
        manager.add_dynamic_config(".*", ops.ALL_SUPPORTED, num_bits=8)
    else:
        num_bits = {"int8": 8, "int16x8": 16}[precision]
        manager.add_static_config(".*", ops.ALL_SUPPORTED, num_bits, 8)
        for op, is_int8 in ((ops.INPUT, int8_inputs), (ops.OUTPUT, int8_outputs)):
            if not is_int8:
                manager.add_quantization_config(".*", op, None, AlgorithmName.NO_QUANTIZE)
    return manager.get_quantization_recipe()


def _ranges(content: bytes, batches: Iterable[dict[str, np.ndarray]]) -> dict[str, Any]:
    """The lowest and the highest value of each tensor, by its name.

    LiteRT Quantizer's own calibrator leaves tensors to XNNPACK and may crash when it reads them,
    and takes moving averages, which forget batches.
    """
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        model_content=content,
        num_threads=1,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        experimental_preserve_all_tensors=True,
    )
    (key,) = interpreter.get_signature_list()
    run = interpreter.get_signature_runner(key)
    tensors = {item["index"]: item["name"] for item in interpreter.get_tensor_details()
               if item["dtype"] == np.float32}  # fmt: skip
    made = {index for op in interpreter._get_ops_details() for index in op["outputs"]}
    made |= {item["index"] for item in interpreter.get_input_details()}
    ranges: dict[str, Any] = {}
    for batch in batches:
        run(**batch)
        for index in made & tensors.keys():
            values = interpreter.get_tensor(index)
            values = values[np.abs(values) < _LARGEST]  # not infinities, as of masks and padding
            if not values.size:
                continue
            found = ranges.setdefault(tensors[index], {"min": values[:1], "max": values[:1]})
            found["min"] = np.minimum(found["min"], values.min(keepdims=True))
            found["max"] = np.maximum(found["max"], values.max(keepdims=True))
    return ranges
