"""Which metric fits, by all labels and by what the model returns on real examples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from tfopt.errors import InputError
from tfopt.measure.metric_names import is_function, parse, spell, split
from tfopt.measure.metrics import is_missing
from tfopt.measure.outputs import Kind
from tfopt.measure.scores import ALL_OUTPUTS

MAX_VALUES = 1 << 17  # distinct labels that are counted; class numbers of vocabularies are fewer
ORDERED_SHARE = 0.95
NAME_ONE = (
    "; correct them, or name what compares them, such as "
    "`metric=pinball(quantiles=[0.1,0.5,0.9])` for quantiles, or a function of your own."
)
VOID = 255  # pixels without a class in PASCAL VOC and Cityscapes
MASK_OF_255 = (
    f"The labels are 0 and {VOID}, and the outputs answer 0 or 1; divide the labels by {VOID}."
)


def scored_outputs(
    metric: str | None,
    output_name: str | None,
    output_names: Sequence[str],
    labelled: Sequence[str] | None,
) -> dict[str, str | None]:
    """Which outputs get a metric, and which one; None where it is chosen by the labels.

    Args:
      metric: as `--metric` takes it.
      output_name: the output that is looked at, where one is named.
      output_names: of the model.
      labelled: outputs that there are labels of; empty where labels name none, None without labels.

    Raises:
      InputError: when metrics, labels and outputs do not go together.
    """
    names = ", ".join(output_names)
    if output_name is not None and output_name not in output_names:
        raise InputError(f"No output {output_name!r}; the model's outputs are: {names}.")
    if labelled is None:
        if metric is None:
            return {}
        raise InputError(
            f"Metric {metric!r} needs labels and the data has none; add an array 'y', or leave "
            "`metric` out to compare with the model's own outputs."
        )
    found = {} if metric is None else split(metric)
    for_all = found.pop(None, None)
    given = {name: text for name, text in found.items() if name is not None}
    is_of_all = output_name is None and len(output_names) > 1
    if is_of_all and for_all is not None and is_function(for_all):
        return {ALL_OUTPUTS: for_all}
    if unknown := [name for name in given if name not in output_names]:
        raise InputError(
            f"`metric` names the output {unknown[0]!r}; the model's outputs are: {names}."
        )
    if output_name is not None and given:
        given = {name: text for name, text in given.items() if name == output_name}
    if not labelled:
        labelled = [output_name] if output_name else [*given] or list(output_names)
        if len(labelled) > 1:
            raise InputError(
                f"The model has outputs {names}; name the one that the labels belong to with "
                "`output_name`, or give labels as a dict by output."
            )
    elif output_name is not None:
        labelled = [name for name in labelled if name == output_name]
    without = [name for name in [*given, *([output_name] if output_name else [])]
               if name not in labelled]  # fmt: skip
    if without:
        raise InputError(f"There are no labels of output {without[0]!r}, which has a metric.")
    if given:
        return dict(given)
    return dict.fromkeys(labelled, for_all)


@dataclasses.dataclass(frozen=True)
class LabelSummary:
    """What one pass over all labels of an output found.

    Attributes:
      num_examples: of them.
      shape: of one example's labels; of ragged ones, that of the first.
      is_ragged: whether shapes differ.
      is_text: whether labels are strings; then nothing else is known.
      is_whole: whether all numbers are whole.
      counts: how often each value occurs, missing ones (-1, -100, NaN) left out; None when there
        are more than `MAX_VALUES`.
      is_one_hot: whether each last axis holds a single 1 and zeros, apart from missing labels.
      is_distribution: whether each last axis adds up to 1 with one entry above one half, as in
        labels that were smoothed.
      has_minus_one: whether -1 occurs.
    """

    num_examples: int
    shape: tuple[int, ...]
    is_ragged: bool
    is_text: bool
    is_whole: bool
    counts: dict[float, int] | None
    is_one_hot: bool
    is_distribution: bool
    has_minus_one: bool

    @property
    def values(self) -> set[float]:
        """Distinct values; {NaN} when there are too many to be classes."""
        return {math.nan} if self.counts is None else set(self.counts)

    @property
    def size(self) -> int:
        """How many labels an example has."""
        return math.prod(self.shape)


def summarize(batches: Iterable[np.ndarray]) -> LabelSummary:
    """Looks at all labels, batch by batch.

    Args:
      batches: labels of one output, (examples, …).
    """
    shapes: set[tuple[int, ...]] = set()
    first: tuple[int, ...] = ()
    counts: dict[float, int] = {}
    num_examples = 0
    is_text = has_minus_one = False
    is_whole = is_one_hot = is_distribution = is_countable = True
    for labels in batches:
        first = first if shapes else labels.shape[1:]
        shapes.add(labels.shape[1:])
        num_examples += len(labels)
        if labels.dtype.kind not in "biufV":
            is_text = True
            continue
        missing = is_missing(labels)
        known = labels[~missing].astype(np.float64)
        has_minus_one |= bool((labels == -1).any())
        is_whole &= bool((np.mod(known, 1) == 0).all())
        if is_countable and is_whole:
            for value, count in zip(*np.unique(known, return_counts=True), strict=True):
                counts[float(value)] = counts.get(float(value), 0) + int(count)
            is_countable = len(counts) <= MAX_VALUES
        if labels.ndim > 1:
            rows = labels.reshape(-1, labels.shape[-1])[
                ~missing.reshape(-1, labels.shape[-1]).any(1)
            ].astype(np.float64)
            is_sum = np.isclose(rows.sum(1), 1, atol=1e-3) & (rows >= 0).all(1)
            is_distribution &= bool((is_sum & (rows.max(1, initial=0) > 0.5)).all())
            is_one_hot &= bool((is_sum & np.isin(rows, (0, 1)).all(1)).all())
    is_row = len(first) > 0 and first[-1] > 1
    return LabelSummary(
        num_examples, first, len(shapes) > 1, is_text, is_whole,
        counts if is_countable and is_whole else None,
        is_one_hot and is_row, is_distribution and is_row, has_minus_one,
    )  # fmt: skip


def choose_metric(outputs: np.ndarray, kind: Kind, labels: LabelSummary) -> str:
    """The metric that fits labels and output when none is named.

    Args:
      outputs: of the model as saved on some real examples, (examples, …).
      kind: what they are; see `tfopt.measure.outputs.infer_kind`.
      labels: all of them.

    Returns:
      `top1` for one class an example, `auc` for two classes with one score, `macro_f1` for several
      tags an example, `mean_iou` for masks, `position_accuracy` for sequences of classes, `mse` for
      numbers.

    Raises:
      InputError: when labels cannot be compared with the output, or could mean several things.
    """
    if labels.is_text or kind is Kind.TEXT:
        what = "labels" if labels.is_text else "outputs"
        raise InputError(
            f"The {what} are text, which no metric of tfopt compares; save class numbers, or give "
            "`metric=package.module:function`."
        )
    if not labels.values:
        raise InputError(
            "All labels are missing (NaN, -1 or -100); give labels, or none at all to compare with "
            "the model's own outputs."
        )
    width = outputs.shape[-1] if outputs.ndim > 1 else 1
    places = max(outputs.ndim - 2, 0)  # axes between examples and channels: pixels, tokens
    size, ndim = math.prod(outputs.shape[1:]), outputs.ndim - 1
    is_ragged = labels.is_ragged
    if size == 1 and labels.shape == (2,) and labels.is_one_hot:
        return "auc"
    if labels.size == 1 and not is_ragged:
        if size == 1:
            return _of_one_number(outputs, kind, labels)
        if size == width:
            return _of_class_scores("top1", outputs, kind, labels)
    elif (len(labels.shape) == ndim) if is_ragged else (labels.size == size):
        return _of_same_shape(outputs, kind, labels, places)
    elif width > 1 and (
        len(labels.shape) == ndim - 1 if is_ragged else labels.size * width == size
    ):
        name = "mean_iou" if places > 1 else "position_accuracy"
        return _of_class_scores(name, outputs, kind, labels)
    raise InputError(
        f"The labels of an example have shape {labels.shape} and the outputs {outputs.shape[1:]}; "
        "no metric of tfopt compares them; correct the labels, or give "
        "`metric=package.module:function`."
    )


def is_of_classes(metric: str) -> bool:
    """Whether a metric compares the highest of several scores with a class number."""
    name, options = parse(metric)
    names = ("top1", "top5", "position_accuracy", "mean_iou")
    return name in names and not {"threshold", "num_classes"} & options.keys()


def _of_one_number(outputs: np.ndarray, kind: Kind, labels: LabelSummary) -> str:
    """One number an example, and a label for it."""
    if kind is Kind.NUMBERS:
        return "top1" if labels.is_whole else "mse"
    values = labels.values
    if values == {0, 1} and labels.has_minus_one and not _are_probabilities(outputs):
        raise InputError(
            "The labels are -1, 0 and 1, and the output is no probability: -1 may be a value or a "
            "missing label; name the metric: `metric=mse` for values, `metric=auc` for two classes."
        )
    if values == {0, 1} or (values == {1} and labels.has_minus_one):
        return "auc"
    if values in ({0}, {1}):
        return _with_threshold("position_accuracy", outputs)
    if kind is Kind.PROBABILITIES and len(values) == 2 and labels.is_whole:
        return "auc"  # of any two labels the larger is the positive class
    return "mse"


def _of_class_scores(name: str, outputs: np.ndarray, kind: Kind, labels: LabelSummary) -> str:
    """A row of scores for each label."""
    width = outputs.shape[-1]
    if kind is Kind.EMBEDDING and _are_directions(outputs):
        raise InputError(
            f"The {width} numbers for each label are a vector of length 1, as embeddings are and "
            "scores of classes are not; leave the labels out to compare directions, or give "
            "`metric=package.module:function`."
        )
    if not labels.is_whole or labels.counts is None:
        raise InputError(
            f"The labels are numbers that are not whole, and the output has {width} for each"
            f"{NAME_ONE}"
        )
    if kind is not Kind.CLASS_SCORES and _are_ordered(outputs, labels.counts):
        raise InputError(
            f"The {width} numbers for each label are in order of size in nearly all examples, as "
            f"quantiles are and scores of classes are not{NAME_ONE}"
        )
    if width == 2 and labels.has_minus_one and labels.values == {1}:
        return "auc"  # -1 and 1 are the two classes
    outside = {v: n for v, n in labels.counts.items() if not 0 <= v < width}
    if set(outside) == {VOID} and name != "top1":
        if width == 2 and labels.values == {0, VOID}:
            raise InputError(MASK_OF_255)
        return spell(name, {"ignore": VOID})
    if outside:
        raise InputError(
            f"{sum(outside.values())} of {sum(labels.counts.values())} labels lie outside 0 to "
            f"{width - 1}, the class numbers of {width} scores: the labels reach from "
            f"{min(labels.counts):g} to {max(labels.counts):g}{NAME_ONE}"
        )
    return name


def _are_ordered(outputs: np.ndarray, counts: dict[float, int]) -> bool:
    """Whether rows rise or fall throughout, although the class at that end is not the usual label.

    Quantiles rise, and the cumulative probabilities of ordinal regression fall; scores of classes
    do so only where the first or the last class is nearly always right.
    """
    width = outputs.shape[-1]
    if width < 3:
        return False
    steps = np.diff(outputs.reshape(-1, width).astype(np.float64), axis=-1)
    total = sum(counts.values())
    for is_ordered, end in (((steps >= 0).all(1), width - 1), ((steps <= 0).all(1), 0)):
        if is_ordered.mean() >= ORDERED_SHARE and counts.get(end, 0) < 0.5 * total:
            return True
    return False


def _of_same_shape(outputs: np.ndarray, kind: Kind, labels: LabelSummary, places: int) -> str:
    """As many labels as outputs."""
    width = outputs.shape[-1] if outputs.ndim > 1 else 1
    if kind is Kind.NUMBERS:
        if not labels.is_whole or labels.counts is None:
            return "mse"
        if outputs.ndim - 1 < 2:
            return "position_accuracy"
        options = {}
        if VOID in labels.counts and outputs.max(initial=0) < VOID and len(labels.counts) > 2:
            options["ignore"] = VOID
        known = [value for value in labels.counts if value != options.get("ignore")]
        highest = max(*known, float(outputs.max(initial=1)), 1.0)
        return spell("mean_iou", {"num_classes": int(highest) + 1, **options})
    if labels.values <= {0, 1}:
        if labels.has_minus_one and labels.values == {1}:
            raise InputError(
                "The labels are -1 and 1, of several tags an example; give 0 for -1, which stands "
                "for a missing label."
            )
        if width > 1 and labels.is_one_hot:
            return "top1" if places == 0 else "mean_iou" if places > 1 else "position_accuracy"
        if width == 1 or outputs.ndim == 3:
            return _with_threshold("mean_iou", outputs)
        if 1 not in labels.values:  # F1 is 0 whatever the model answers
            return _with_threshold("position_accuracy", outputs)
        return _with_threshold("macro_f1", outputs)
    if labels.values == {0, 1, VOID}:
        return _with_threshold("mean_iou", outputs, ignore=VOID)
    if labels.values == {0, VOID} and kind is Kind.PROBABILITIES:
        raise InputError(MASK_OF_255)
    is_class = kind is Kind.CLASS_SCORES or _are_logits(outputs)
    if labels.is_distribution and places == 0 and is_class:
        return "top1"
    return "mse"


def _are_probabilities(outputs: np.ndarray) -> bool:
    found = outputs.astype(np.float32)
    return bool(found.min(initial=0) >= 0 and found.max(initial=0) <= 1)


def _are_directions(outputs: np.ndarray) -> bool:
    return bool(np.allclose(np.linalg.norm(outputs.astype(np.float32), axis=-1), 1, atol=1e-2))


def _are_logits(outputs: np.ndarray) -> bool:
    """Whether rows are too far from adding up to 1 for shares that a regression estimates."""
    found = outputs.astype(np.float64)
    return bool(found.max() > 1.5 or found.min() < -0.5)


def _with_threshold(name: str, outputs: np.ndarray, **options: int) -> str:
    """Probabilities are decided at 0.5, logits at 0."""
    return spell(name, {"threshold": 0.5 if _are_probabilities(outputs) else 0, **options})
