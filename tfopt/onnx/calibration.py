"""Ranges of the tensors inside an ONNX model, from real examples."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.errors import ConversionError

METHODS = ("minmax", "percentile", "entropy")

_ENTROPY_BINS = 512  # ONNX Runtime's 128 leave only the whole range to choose
_MIN_VALUES = 8 * _ENTROPY_BINS  # of a tensor; fewer do not show how they are distributed
_CHUNK = 16  # batches whose activations the histogram calibrators hold at a time
_GROWTH = 8.0  # how much wider a range may become before its histogram is made anew
_SMALLEST = 1e-30  # below it, float32 cannot tell the edges of bins apart

Arrays = dict[str, np.ndarray]


def ranges(
    file: Path,
    method: str,
    batches: Iterator[Arrays],
    ops: Collection[str],
    *,
    is_symmetric: bool,
) -> tuple[Any, set[str]]:
    """Ranges of what operators read and make.

    Args:
      file: an ONNX model in float32.
      method: one of `METHODS`.
      batches: real inputs.
      ops: the operators that are looked at.
      is_symmetric: whether ranges have 0 in the middle.

    Returns:
      ONNX Runtime's `TensorsData`, and the names of tensors that held infinite values or NaN.

    Raises:
      ConversionError: when there are no examples.
    """
    from onnxruntime.quantization.calibrate import create_calibrator

    options: dict[str, bool | int] = {"symmetric": is_symmetric}
    if method == "entropy":
        options["num_bins"] = _ENTROPY_BINS
    calibrator = create_calibrator(
        file,
        sorted(ops),
        augmented_model_path=str(file.with_name("augmented.onnx")),
        calibrate_method=onnxruntime_method(method),
        extra_options=options,
    )
    collector: Any = None
    if method != "minmax":
        collector = calibrator.collector = _collector(calibrator)
    is_empty = True
    # The histogram calibrators hold all activations of all batches that one call reads.
    while chunk := list(itertools.islice(batches, _CHUNK)):
        calibrator.collect_data(_Reader(chunk))
        is_empty = False
    if is_empty:
        raise ConversionError(
            "int8 is calibrated on real examples and there are none; give more `data`."
        )
    found = calibrator.compute_data()
    if method == "entropy":
        _widen_sparse(found, collector.histogram_dict, is_symmetric)
    not_finite = {
        name for name, item in found.data.items() if not np.isfinite(item.range_value).all()
    }
    return found, not_finite | (set() if collector is None else collector.not_finite)


def _widen_sparse(found: Any, histograms: Mapping[str, Any], is_symmetric: bool) -> None:
    """Gives tensors of few values their whole range, which entropy would cut at random."""
    for name, item in found.data.items():
        hist, _, low, high, *_ = histograms[name]
        if hist.sum() < _MIN_VALUES:
            if is_symmetric:
                high = max(-low, high)
                low = -high
            item.lowest, item.highest = np.array(low, np.float32), np.array(high, np.float32)


def onnxruntime_method(method: str) -> Any:
    """What ONNX Runtime calls one of `METHODS`."""
    from onnxruntime.quantization import CalibrationMethod

    methods = (
        CalibrationMethod.MinMax, CalibrationMethod.Percentile, CalibrationMethod.Entropy,
    )  # fmt: skip
    return dict(zip(METHODS, methods, strict=True))[method]


def _collector(calibrator: Any) -> Any:
    """ONNX Runtime's collector of histograms for values of any size.

    Its own fails for values that are not finite, for batches of different sizes, for float16, for
    ranges of a few denormal numbers, and for ranges that grow by many orders of magnitude, whose
    histograms outgrow the memory.
    """
    from onnxruntime.quantization.calibrate import HistogramCollector

    class Collector(HistogramCollector):  # type: ignore[misc, unused-ignore]
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            self.not_finite: set[str] = set()

        def collect(self, name_to_arr: dict[str, list[np.ndarray]]) -> None:
            found = {}
            for name, arrays in name_to_arr.items():
                values = np.concatenate([np.asarray(item, np.float32).ravel() for item in arrays])
                if not np.isfinite(values).all():
                    self.not_finite.add(name)
                    values = values[np.isfinite(values)]
                found[name] = np.where(np.abs(values) < _SMALLEST, np.float32(0), values)
            super().collect(found)

        def collect_absolute_value(self, name_to_arr: dict[str, np.ndarray]) -> None:
            for name, values in name_to_arr.items():
                known = self.histogram_dict.get(name)
                limit = np.abs(values).max(initial=0)
                if known is not None and limit > _GROWTH * known[1][-1]:
                    hist, edges = _moved(known[0], known[1], (0, limit))
                    self.histogram_dict[name] = (hist, edges, *known[2:])
            super().collect_absolute_value(name_to_arr)

        def merge_histogram(
            self, old_histogram: Any, data_arr: Any, new_min: Any, new_max: Any, new_threshold: Any
        ) -> Any:
            hist, edges, low, high, threshold = old_histogram
            if new_threshold > _GROWTH * threshold > 0:
                ends = (-new_threshold, new_threshold)
                old_histogram = (*_moved(hist, edges, ends), low, high, new_threshold)
            return super().merge_histogram(old_histogram, data_arr, new_min, new_max, new_threshold)

    return Collector(
        calibrator.method,
        calibrator.symmetric,
        calibrator.num_bins,
        calibrator.num_quantized_bins,
        calibrator.percentile,
        calibrator.scenario,
    )


def _moved(
    hist: np.ndarray, edges: np.ndarray, ends: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """A histogram of as many bins over a wider range."""
    middles = (edges[:-1] + edges[1:]) / 2
    moved, wider = np.histogram(middles, len(hist), range=ends, weights=hist)
    return moved.astype(hist.dtype), wider.astype(edges.dtype)


class _Reader:
    """The reader that ONNX Runtime's calibrators ask for: one batch a call, then None."""

    def __init__(self, batches: Iterable[Arrays]):
        self._batches = iter(batches)

    def get_next(self) -> Arrays | None:
        return next(self._batches, None)
