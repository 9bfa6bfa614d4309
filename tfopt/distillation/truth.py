"""Labels of a batch beside a model's outputs, with what Keras has to pass over."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tfopt.distillation import heads, reduction
from tfopt.distillation import labels as labels_of


@dataclasses.dataclass(frozen=True)
class Truth:
    """Labels of a batch.

    Attributes:
      names: of all outputs.
      labels: by output, as they came, for those outputs that have some.
      filled: in the structure of the outputs, zeros where there is none; None without labels.
      masks: of shape (examples, positions…) by output: whether a position has a label.
      counted: likewise, for those outputs that have padding or positions to ignore: whether a
        position counts at all. An example without any label counts: its teachers teach it.
    """

    names: tuple[str, ...]
    labels: Mapping[str, Any]
    filled: Any
    masks: Mapping[str, Any]
    counted: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        labels: Any,
        outputs: Mapping[str, Any],
        structure: Any,
        is_of_classes: Mapping[str, bool],
        ignored: Mapping[str, int],
    ) -> Truth:
        """Takes labels as `fit` does: for the only output, in the order of outputs, or by name.

        Args:
          labels: as they came.
          outputs: of the model, by name.
          structure: the same outputs as the model returned them.
          is_of_classes: of outputs, by name.
          ignored: the class that losses ignore, by output.
        """
        import tensorflow as tf

        names = tuple(outputs)
        counted = {name: reduction.mask_of(output) for name, output in outputs.items()}
        found = heads.given(labels, names, "labels")
        found = {name: tf.convert_to_tensor(value) for name, value in found.items()}
        filled, masks = {}, {}
        for name, value in found.items():
            num_axes = max(1, (outputs[name].shape.rank or 2) - 1)
            filled[name], masks[name] = labels_of.split(
                value, is_of_classes.get(name, False), num_axes
            )
            own = _counted(value, masks[name], ignored.get(name), num_axes)
            counted[name] = reduction.both(counted[name], own)
        counted = {name: mask for name, mask in counted.items() if mask is not None}
        made = heads.packed(structure, filled, names) if found else None
        return cls(names, found, made, masks, counted)

    def masked(self, outputs: Any) -> Any:
        """Outputs whose positions without a label losses and metrics of Keras pass over."""
        return self._marked(outputs, self.masks)

    def weights(self, weights: Any, outputs: Any) -> Any:
        """Weights as Keras takes them: one for all outputs, or in the structure of these."""
        if isinstance(weights, (Mapping, list, tuple)):
            return heads.packed(outputs, heads.given(weights, self.names, "weights"), self.names)
        return weights

    def for_losses(self, outputs: Any, weights: Any) -> tuple[Any, Any]:
        """Outputs as `masked`, and weights, for losses of tf_keras.

        These divide by the number of examples that are left, and get NaN where none is: there all
        are left, with weights of 0.
        """
        import tensorflow as tf

        has_some = {name: tf.reduce_any(mask) for name, mask in self.masks.items()}
        masks = {name: mask | tf.logical_not(has_some[name]) for name, mask in self.masks.items()}
        found = {}
        for name, mask in masks.items():
            own = self.weights_of(weights, name)
            own = tf.ones_like(mask, tf.float32) if own is None else tf.cast(own, tf.float32)
            found[name] = own * tf.cast(has_some[name], tf.float32)
        return self._marked(outputs, masks), heads.packed(outputs, found, self.names)

    def weights_of(self, weights: Any, name: str) -> Any:
        """The weights of examples or positions for an output, None if there are none."""
        if isinstance(weights, (Mapping, list, tuple)):
            return heads.given(weights, self.names, "weights").get(name)
        return weights

    def _marked(self, outputs: Any, masks: Mapping[str, Any]) -> Any:
        import tensorflow as tf

        flat = dict(zip(self.names, tf.nest.flatten(outputs), strict=True))
        marked = {
            name: _with_mask(output, masks[name]) if name in masks else output
            for name, output in flat.items()
        }
        return heads.packed(outputs, marked, self.names)


def _counted(labels: Any, is_there: Any, ignored: int | None, num_axes: int) -> Any:
    """Which positions count, by their labels; None if all do."""
    import tensorflow as tf

    found = None
    if is_there.shape.rank > 1:  # by position: one without a label beside others is padding
        axes = list(range(1, is_there.shape.rank))
        has_none = tf.logical_not(tf.reduce_any(is_there, axes, keepdims=True))
        found = is_there | has_none
    if ignored is not None and ignored >= 0:
        found = reduction.both(
            found, tf.logical_not(labels_of.is_class(labels, ignored, num_axes))
        )  # fmt: skip
    return found


def _with_mask(output: Any, mask: Any) -> Any:
    """A copy of an output that carries a mask, and whatever Keras had left with it."""
    import tensorflow as tf

    shaped = reduction.along(mask, max(mask.shape.rank, output.shape.rank - 1))
    shaped = reduction.both(reduction.mask_of(output), shaped)
    copy = tf.identity(output)
    logits = getattr(output, "_keras_logits", None)
    if logits is not None:
        copy._keras_logits = logits
    copy._keras_mask = shaped
    return copy
