"""Converts frozen graphs with `tf.lite.TFLiteConverter`."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfopt import saved_model
from tfopt.errors import MAX_REASON, ConversionError, first_line
from tfopt.graph import SIGNATURE_KEY
from tfopt.litert.rewrites import REWRITES, rewrite

if TYPE_CHECKING:
    from tfopt.runtimes.base import Arrays, Conversion


def optimize(converter: Any) -> None:
    """Asks for weights in int8."""
    import tensorflow as tf

    converter.optimizations = [tf.lite.Optimize.DEFAULT]


def calibrate(converter: Any, conversion: Conversion) -> None:
    """Gives the converter examples to measure the ranges of activations on.

    Raises:
      ConversionError: when there are none, or the model has loops.
    """

    def examples() -> Iterator[tuple[str, Arrays]]:
        for batch in conversion.calibration_batches():
            yield SIGNATURE_KEY, batch

    if conversion.source.frozen_graph().has_loops:
        raise ConversionError(
            "LiteRT cannot calibrate models with loops (LSTM, GRU): its calibrator crashes; "
            "dynamic_range and float16 work."
        )
    next(iter(conversion.calibration_batches()))
    optimize(converter)
    converter.representative_dataset = examples


def convert(conversion: Conversion, configure: Callable[[Any], None]) -> bytes:
    """Converts the frozen graph, with a fixed batch size where the converter insists on one.

    Args:
      conversion: of a SavedModel; gets a note where the batch size is fixed.
      configure: called with the converter before it runs.

    Returns:
      The `.tflite` file.

    Raises:
      ConversionError: when the converter refuses; names the operations where it does.
    """
    fixed = conversion.signature.with_batch_size(conversion.batch_size)
    folder, graph = conversion.source.frozen_folder, None
    if saved_model.count_ops(folder).keys() & REWRITES.keys():
        frozen = conversion.source.frozen_graph()
        graph = rewrite(frozen)
        if graph is not frozen:
            folder = conversion.folder / "rewritten"
            graph.save(folder)
    try:
        content = _run_converter(folder, configure)
    except ConversionError as error:
        if fixed == conversion.signature:
            raise
        graph = graph or conversion.source.frozen_graph()
        try:
            graph.with_batch_size(conversion.batch_size).save(conversion.folder / "fixed")
        except ValueError as no_such_size:  # the model does not take batches of this size
            raise error from no_such_size
        content = _run_converter(conversion.folder / "fixed", configure)
        conversion.signature = fixed
        conversion.notes.append(
            f"The batch size is fixed at {conversion.batch_size}: LiteRT cannot convert this model "
            "with a free one."
        )
    for made in ("rewritten", "fixed"):
        shutil.rmtree(conversion.folder / made, ignore_errors=True)
    conversion.signature = dataclasses.replace(conversion.signature, key=SIGNATURE_KEY)
    return content


def _run_converter(folder: Path, configure: Callable[[Any], None]) -> bytes:
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(
        str(folder), signature_keys=[SIGNATURE_KEY]
    )
    configure(converter)
    try:
        return converter.convert()
    except ConversionError:
        raise
    except Exception as error:  # the converter raises bare Exception subclasses of its own
        raise ConversionError(_reason(str(error), first_line(error))) from error


def _reason(text: str, fallback: str) -> str:
    """Why the converter refused, from its message: the operations, where it names them.

    It names what TensorFlow's own kernels could run inside LiteRT ("TF Select ops"), which no
    package for Python brings, and what nobody can ("Custom ops").
    """
    named = re.findall(r"^(?:TF Select|Custom) ops: *(.+)$", text, re.MULTILINE)
    named += [] if named else re.findall(r"'tf\.(\w+)' op is neither a custom op nor", text)
    ops = sorted({op.strip() for names in named for op in names.split(",")})
    if ops:
        layers = re.findall(
            rf'"(?:{"|".join(map(re.escape, ops))}):", "(?:\w*PartitionedCall/)*([^"@]+)', text
        )
        where = f" (in {', '.join(dict.fromkeys(layers))})" if layers else ""
        return (
            f"LiteRT has no kernel for {', '.join(ops)}{where}; it would need TensorFlow's (Select "
            "TF ops), which ai-edge-litert does not run. Another runtime may, or take it out of "
            "the model."
        )
    # Other reasons carry long locations; what follows the last one is the reason.
    reasons = [reason for reason in re.findall(r"error: (.+)", text) if "loc(" not in reason]
    return f"The LiteRT converter refused: {(reasons[0] if reasons else fallback)[:MAX_REASON]}"
