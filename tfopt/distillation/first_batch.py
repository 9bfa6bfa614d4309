"""The first examples of what `fit` takes, and whether labels fit the outputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tfopt.distillation import heads
from tfopt.distillation.heads import Heads
from tfopt.errors import InputError

NUM_EXAMINED = 256  # examples by which student and teachers are examined


def arrays(values: Any) -> Any:
    """Data frames and series of pandas as arrays; everything else as it is."""
    if isinstance(values, Mapping):
        return {name: arrays(value) for name, value in values.items()}
    if type(values) in (list, tuple):
        return type(values)(map(arrays, values))
    return values.to_numpy() if hasattr(values, "to_numpy") else values


def leaves(values: Any) -> list[Any]:
    """What is in dictionaries and lists, without None."""
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, (list, tuple)):
        return [leaf for value in values for leaf in leaves(value)]
    return [] if values is None else [values]


def first_batch(x: Any, y: Any = None, weights: Any = None) -> tuple[Any, tuple[Any, Any, Any]]:
    """Data as they were, and inputs, labels and weights of some examples, None where there is none.

    Raises:
      InputError: when there are none.
    """
    import tensorflow as tf

    if isinstance(x, Iterator):
        batch = next(x, None)
        x = _chained(batch, x)
    elif isinstance(x, tf.data.Dataset):
        batch = next(iter(x), None)
    elif hasattr(x, "__getitem__") and hasattr(x, "on_epoch_end"):  # PyDataset, Sequence
        batch = x[0] if len(x) else None
    else:
        few = [_first(each) for each in (x, y, weights)]
        flat = tf.nest.flatten(few[0])
        batch = tuple(few) if flat and len(flat[0]) else None
    if batch is None:
        raise InputError("The data hold no examples; at least one batch is needed.")
    if not isinstance(batch, (list, tuple)):
        batch = (batch,)
    inputs, labels, given = (*map(arrays, batch), None, None)[:3]
    return x, (inputs, labels, given)


def first_inputs(x: Any) -> tuple[Any, Any]:
    """Data as they were, and the inputs of some examples of them.

    Raises:
      InputError: when there are none.
    """
    x, (inputs, _, _) = first_batch(x)
    return x, inputs


def ignored_classes(loss: Any, names: Sequence[str]) -> dict[str, int]:
    """The class that losses of `compile` ignore, by output, where they do."""
    is_one = not isinstance(loss, (Mapping, list, tuple))
    by_name = dict.fromkeys(names, loss) if is_one else heads.given(loss, names, "losses")
    found = {name: getattr(each, "ignore_class", None) for name, each in by_name.items()}
    return {name: int(number) for name, number in found.items() if number is not None}


def check_labels(labels: Any, outputs: Heads, losses: Mapping[str, str], loss: Any) -> None:
    """Checks labels against outputs and losses.

    Args:
      labels: as `fit` takes them, all of them or those of a batch; None without.
      outputs: of the student.
      losses: names of the losses against labels, by output.
      loss: as `compile` takes it.

    Raises:
      InputError: for labels of other outputs, losses without labels, other shapes, and numbers of
        classes that there are not.
    """
    found = heads.given(labels, outputs.names, "labels")
    if not found:
        return
    missing = [name for name in losses if name not in found]
    if missing:
        raise InputError(
            f"There is a loss for output {missing[0]!r} and there are no labels for it, only for "
            f"{', '.join(found)}; give it labels (-1 or NaN where an example has none), or give a "
            "dictionary of losses without it."
        )
    ignored = ignored_classes(loss, outputs.names)
    for name, value in found.items():
        values = np.asarray(value)
        where = f" of output {name!r}" if len(outputs.names) > 1 else ""
        if values.dtype.kind not in "biuf":
            raise InputError(
                f"Labels{where} have dtype {values.dtype}; expected numbers, such as those of "
                "classes."
            )
        if "sparse" in losses.get(name, "").lower():
            _check_classes(values, outputs.shapes[name], ignored.get(name), where)


def _check_classes(
    labels: np.ndarray, shape: Sequence[int | None], ignored: int | None, where: str
) -> None:
    """Checks numbers of classes, of outputs whose examples have that shape."""
    expected, own = tuple(shape[:-1]), labels.shape[1:]
    if not _fits(own, expected) and not (own[-1:] == (1,) and _fits(own[:-1], expected)):
        raise InputError(
            f"Labels{where} have shape {own} for one example and outputs {tuple(shape)}; expected "
            f"{expected}, the whole number of a class."
        )
    if shape[-1] is None or not labels.size:
        return
    kept = labels[~np.isnan(labels)] if labels.dtype.kind == "f" else labels
    if ignored is not None:
        kept = kept[kept != ignored]
    if kept.size and kept.max() >= shape[-1]:
        raise InputError(
            f"Labels{where} go up to {kept.max()} and the student has {shape[-1]} classes there; "
            f"expected 0 to {shape[-1] - 1}, and -1 where there is none."
        )


def _fits(own: Sequence[int], expected: Sequence[int | None]) -> bool:
    return len(own) == len(expected) and all(
        size in (None, other) for size, other in zip(expected, own, strict=True)
    )


def _first(values: Any) -> Any:
    import tensorflow as tf

    if values is None:
        return None
    return tf.nest.map_structure(lambda each: None if each is None else each[:NUM_EXAMINED], values)


def _chained(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    """A generator, which Keras asks for."""
    yield from itertools.chain([first], rest)
