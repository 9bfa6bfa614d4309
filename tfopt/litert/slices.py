"""New axes in slices (`x[:, None]`) as ExpandDims."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

_MASKS = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")


def without_new_axes(operation: Any) -> Callable[..., Any] | None:
    """A StridedSlice with new axes as one without, and ExpandDims.

    The converter makes a Reshape of new axes, except where two dimensions are free or all of them
    are more than four. Others stay.
    """
    import tensorflow as tf

    shape = operation.inputs[0].shape
    masks = {name: operation.get_attr(name) for name in _MASKS}
    if not masks["new_axis_mask"] or operation.outputs[0].shape.rank is None:
        return None
    num_entries = operation.inputs[1].shape[0]
    kinds = [_kind(masks, entry) for entry in range(num_entries)]
    num_free = sum(size is None for size in shape)
    if num_free < 2 and shape.rank + kinds.count("new_axis") <= 4:
        return None
    num_named = num_entries - kinds.count("ellipsis") - kinds.count("new_axis")
    widths = {"ellipsis": shape.rank - num_named, "shrink_axis": 0}  # in the output; others 1
    places = np.cumsum([0, *(widths.get(kind, 1) for kind in kinds)])
    new_axes = [
        int(place) for place, kind in zip(places, kinds, strict=False) if kind == "new_axis"
    ]
    kept = [entry for entry, kind in enumerate(kinds) if kind != "new_axis"]
    left = {
        name: sum((masks[name] >> entry & 1) << place for place, entry in enumerate(kept))
        for name in _MASKS
    }
    strides = tf.get_static_value(operation.inputs[3])
    is_whole = strides is not None and all(
        kinds[entry] == "ellipsis" or (kinds[entry] == "whole" and strides[entry] == 1)
        for entry in kept
    )

    def compute(x: Any, begin: Any, end: Any, strides: Any) -> Any:
        if not is_whole:
            begin, end, strides = (tf.gather(values, kept) for values in (begin, end, strides))
            x = tf.raw_ops.StridedSlice(input=x, begin=begin, end=end, strides=strides, **left)
        for axis in new_axes:
            x = tf.expand_dims(x, axis)
        return x

    return compute


def _kind(masks: dict[str, int], entry: int) -> str:
    """What one entry of a slice is; where several bits are set TensorFlow takes the first here."""
    for name in ("ellipsis", "new_axis", "shrink_axis"):
        if masks[f"{name}_mask"] >> entry & 1:
            return name
    is_whole = masks["begin_mask"] & masks["end_mask"] & 1 << entry
    return "whole" if is_whole else "range"
