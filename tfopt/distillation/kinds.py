"""Whether an output is of classes or of values, by what is known of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

VALUES = "values"

# Losses of Keras against values, which say nothing of classes.
OF_VALUES = frozenset(
    {
        "mse", "meansquarederror", "mae", "meanabsoluteerror", "mape",
        "meanabsolutepercentageerror", "msle", "meansquaredlogarithmicerror", "huber", "huberloss",
        "logcosh", "cosinesimilarity", "poisson",
    }
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Made:
    """What made an output.

    Attributes:
      activation: `linear`, `softmax` or `sigmoid`.
      is_known: whether a layer shows it; else it is inferred from the values.
      size: of the last axis.
    """

    activation: str
    is_known: bool
    size: int


def kind_of(made: Made, of_teachers: Sequence[str], label_loss: str | None) -> str:
    """`softmax` or `sigmoid` for classes, `values` for everything else.

    A softmax is of classes whatever the loss against labels is, and so is what a cross-entropy
    looks at. From a loss that is not Keras's nothing follows, and outputs decide. Linear outputs
    without a loss against labels are taken for logits if there are several.

    Args:
      made: what made the student's output.
      of_teachers: activations of the outputs that teach it.
      label_loss: name of the loss against labels, if there is one.
    """
    if made.activation == "softmax":
        return "softmax"
    known = [activation for activation in of_teachers if activation != "linear"]
    if label_loss is None:
        if made.activation != "linear":
            return made.activation
        if known:
            return known[0]
        return "softmax" if made.size > 1 else VALUES
    name = label_loss.lower().replace("_", "")
    if "binary" in name:
        return "sigmoid"
    if "crossentropy" in name or "kldiv" in name:
        return "softmax"
    if name not in OF_VALUES:
        if made.activation == "sigmoid" and made.is_known:
            return "sigmoid"
        if made.activation == "linear" and "softmax" in known:
            return "softmax"
    return VALUES
