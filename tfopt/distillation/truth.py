"""Labels of a batch beside a model's outputs, with what Keras has to pass over."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tfopt.distillation import labels as labels_of


@dataclasses.dataclass(frozen=True)
class Truth:
    """Labels of a batch.

    Attributes:
      labels: by output, as they came, for those outputs that have some.
      filled: in the structure that they came in, zeros where there is none; None without labels.
      masks: of shape (examples,) by output: whether an example has a label.
    """

    labels: Mapping[str, Any]
    filled: Any
    masks: Mapping[str, Any]

    @classmethod
    def of(cls, labels: Any, names: Sequence[str], is_of_classes: Mapping[str, bool]) -> Truth:
        """Takes labels as `fit` does: one tensor, in the order of outputs, or by their names."""
        import tensorflow as tf

        if labels is None:
            return cls({}, None, {})
        by_name = by_output(labels, names)
        split = {
            name: labels_of.split(tf.convert_to_tensor(value), is_of_classes.get(name, False))
            for name, value in by_name.items()
        }
        filled = [split[name][0] for name in by_name]
        if isinstance(labels, Mapping):
            structure: Any = dict(labels) | dict(zip(by_name, filled, strict=True))
        elif isinstance(labels, (list, tuple)):
            structure = type(labels)(filled)
        else:
            (structure,) = filled
        return cls(by_name, structure, {name: mask for name, (_, mask) in split.items()})

    def masked(self, outputs: Any, names: Sequence[str]) -> Any:
        """Outputs whose examples without a label losses and metrics of Keras pass over."""
        return self._marked(outputs, names, self.masks)

    def for_losses(self, outputs: Any, weights: Any, names: Sequence[str]) -> tuple[Any, Any]:
        """Outputs as `masked`, and weights, for losses of tf_keras.

        These divide by the number of examples that are left, and get NaN where none is: there all
        are left, with weights of 0.
        """
        import tensorflow as tf

        has_some = {name: tf.reduce_any(mask) for name, mask in self.masks.items()}
        masks = {name: mask | tf.logical_not(has_some[name]) for name, mask in self.masks.items()}
        found = {}
        for name, mask in masks.items():
            own = of_output(weights, name, names)
            own = tf.ones_like(mask, tf.float32) if own is None else tf.cast(own, tf.float32)
            found[name] = own * tf.cast(has_some[name], tf.float32)
        marked = self._marked(outputs, names, masks)
        return marked, found if len(names) > 1 else found[names[0]]

    @staticmethod
    def _marked(outputs: Any, names: Sequence[str], masks: Mapping[str, Any]) -> Any:
        import tensorflow as tf

        flat = []
        for name, output in zip(names, tf.nest.flatten(outputs), strict=True):
            if name in masks:
                flat.append(_with_mask(output, masks[name]))
            else:
                flat.append(output)
        return tf.nest.pack_sequence_as(outputs, flat)


def by_output(values: Any, names: Sequence[str]) -> dict[str, Any]:
    """Labels or weights by the names of outputs; of one for all outputs, the first's."""
    if values is None:
        return {}
    if isinstance(values, Mapping):
        return {name: values[name] for name in names if values.get(name) is not None}
    if isinstance(values, (list, tuple)):
        return {
            name: value for name, value in zip(names, values, strict=False) if value is not None
        }
    return {names[0]: values}


def of_output(weights: Any, name: str, names: Sequence[str]) -> Any:
    """The weights of examples for an output, None if there are none."""
    if isinstance(weights, (Mapping, list, tuple)):
        return by_output(weights, names).get(name)
    return weights


def _with_mask(output: Any, mask: Any) -> Any:
    """A copy of an output that carries a mask, and whatever Keras had left with it."""
    import tensorflow as tf

    before = getattr(output, "_keras_mask", None)
    rank = 1 if before is None else before.shape.rank
    shaped = labels_of.along(mask, max(rank, output.shape.rank - 1))
    if before is not None:
        shaped = tf.logical_and(tf.cast(before, tf.bool), shaped)
    copy = tf.identity(output)
    logits = getattr(output, "_keras_logits", None)
    if logits is not None:
        copy._keras_logits = logits
    copy._keras_mask = shaped
    return copy
