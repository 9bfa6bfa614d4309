"""What teachers say about examples, on disk: every epoch after the first costs the student only.

A folder holds `cache.json` (whose targets these are, and how many are finished), `targets/` (a file
for each tensor, row after row) and, where the data came as a data set, `data/` (the same for
inputs, labels and weights). Rows are only appended, and recorded when they are safe on disk: a kill
loses what came after the last record, a second ago.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.distillation.cache_data import Examples, open_examples
from tfopt.distillation.cache_files import (
    FIX,
    TARGETS,
    Rows,
    TargetWriter,
    describe,
    is_float,
    is_number,
    locked,
    open_record,
    open_rows,
    read_record,
    writing,
)  # fmt: skip
from tfopt.distillation.nested import difference, names, put_together, take_apart
from tfopt.distillation.permutation import permuted
from tfopt.errors import InputError
from tfopt.progress import Progress

NUM_PARTS = 10  # of filling; each gets a line

# How far the targets of the first batch may move, as a share of their deviation between examples.
# Half precision on another device moves logits by one or two hundredths; another preprocessing
# moves them by a third and more.
TOLERANCE = 0.05

View = Callable[[Any, Any, Any], tuple[Any, Any]]


def cached(
    data: Any,
    ask: Callable[[Any], Any],
    folder: str | Path,
    *,
    identity: Mapping[str, Any],
    batch_size: int,
    seed: int = 0,
    view: View | None = None,
    num_views: int = 1,
    progress: Progress | None = None,
) -> CachedBatches:
    """Opens a cache of what teachers say about examples, or begins one.

    Targets are kept by example; every epoch has an order of its own, and batches may have any
    size. With a view they are kept by view and position: epoch e repeats view e % num_views, batch
    by batch as the teachers saw it. More views can be asked for later, and are added.

    A cache belongs to its teachers and inputs; one with a view also to labels, batch size and
    seed. What a preprocessing or a view does cannot be hashed, so the teachers are asked about the
    first batch once more, and their targets may move by 0.05 of their deviation between examples
    (root mean square): half precision on another device stays within that.

    Only one process can write to a folder: each of several workers needs one of its own.

    Args:
      data: `x`, `(x, y)` or `(x, y, sample_weight)`, where x and y are arrays of shape
        (examples, …) or nested tuples and dictionaries of them, and y may be None; or a
        tf.data.Dataset of batches of these that ends. It is copied into the folder, and read once
        more whenever the cache is opened, to see that it yields the same, in any order.
      ask: takes a batch of inputs, tensors, and returns nested tuples and dictionaries of tensors
        of shape (examples, …). Targets keep their dtypes, but float64 becomes float32.
      folder: a new one, or that of an earlier run.
      identity: tells the teachers from others, such as by the SHA-256 of their files; for JSON.
      batch_size: examples in a batch, of all replicas together. The last batch may be smaller.
      seed: of orders and views.
      view: takes inputs and labels (or None) of a batch, as TensorFlow tensors, and a seed, int32
        of shape (2,); returns both as teachers and student see them. The same seed must give the
        same. It is run on the CPU, as part of the data set.
      num_views: of each example.
      progress: is told when a data set is copied.

    Raises:
      InputError: when an argument does not fit, the folder holds something else, or targets or
        view are not what they were.
      ResultError: when the folder cannot be written.
    """
    for name, number in (("batch_size", batch_size), ("num_views", num_views)):
        if number < 1:
            raise InputError(f"{name} is {number}; expected 1 or more.")
    if view is None and num_views > 1:
        raise InputError(f"{num_views} views are asked for and there is no view; give one.")
    folder = Path(folder).absolute()
    key = {
        "identity": json.loads(json.dumps(identity)),
        "view": None if view is None else {"batch_size": int(batch_size), "seed": int(seed)},
    }
    with writing(folder):
        record = open_record(folder, key)
        examples = open_examples(
            data, folder, record, view is not None, progress or Progress(is_quiet=True)
        )
    found = CachedBatches(examples, ask, folder, batch_size, seed, view, num_views)
    found.check()
    return found


class CachedBatches:
    """Batches of examples with what teachers said about them; made by `cached`.

    Attributes:
      num_examples: in an epoch.
      num_batches: in an epoch.
      epoch: whose batches the next pass over `dataset()` gives; 0 until it is set, as a callback
        should when an epoch begins.
    """

    def __init__(
        self,
        examples: Examples,
        ask: Callable[[Any], Any],
        folder: Path,
        batch_size: int,
        seed: int,
        view: View | None,
        num_views: int,
    ):
        self._examples, self._ask, self._folder = examples, ask, folder
        self._batch_size, self._seed = int(batch_size), int(seed)
        self._view, self._num_views = view, num_views
        self.num_examples = examples.num_examples
        self.num_batches = -(-self.num_examples // self._batch_size)
        self.epoch = 0
        self._record = read_record(folder)

    @property
    def is_complete(self) -> bool:
        """Whether all targets are on disk."""
        return self._record["num_done"] >= self._num_targets

    @property
    def _num_targets(self) -> int:
        return self.num_examples * self._num_views

    def fill(self, progress: Progress | None = None) -> None:
        """Asks the teachers about all that is not on disk yet.

        It may be killed at any moment, and goes on where it was recorded last.

        Args:
          progress: gets a line for each tenth.

        Raises:
          InputError: when targets are not finite, or not a row for each example, of the same
            structure, shapes and dtypes in all batches; or another process fills this cache.
          ResultError: when the folder cannot be written.
        """
        if self.is_complete:
            return
        with locked(self._folder):
            self._record = read_record(self._folder)  # another process may have been faster
            self._fill(progress or Progress(is_quiet=True))

    def dataset(self) -> Any:
        """A tf.data.Dataset of the batches of one epoch, for `fit`.

        It yields `({"inputs": inputs, "targets": targets}[, labels[, sample_weight]])`, tensors
        whose shapes are known but for the number of examples. Each pass is one of the epoch that
        `epoch` says when its first batch is asked for. Labels are None where only weights came;
        tf.distribute cannot pass these on, so give labels that are NaN for several devices.

        Raises:
          InputError: when the cache is not filled.
        """
        import tensorflow as tf

        if not self.is_complete:
            raise InputError(
                f"The cache in {self._folder} holds {self._record['num_done']} of "
                f"{self._num_targets} targets; call fill() first."
            )
        examples, targets, template = self._examples, self._targets(), self._record["targets"]

        def batches() -> Iterator[tuple[np.ndarray, ...]]:
            turn = self.epoch if self._view is None else self.epoch % self._num_views
            for begin in range(0, self.num_examples, self._batch_size):
                stop = min(begin + self._batch_size, self.num_examples)
                rows = self._order(turn, begin, stop)
                # Targets of views lie in the order in which they were asked for.
                first = turn * self.num_examples
                said = rows if self._view is None else slice(first + begin, first + stop)
                yield (
                    *(column[rows] for column in examples.columns),
                    *(column[said] for column in targets),
                    self._batch_seed(turn, begin),
                )

        def assembled(*leaves: Any) -> tuple[Any, ...]:
            inputs, labels, weights = self._viewed(leaves)
            said = put_together(template, leaves[len(examples.columns) : -1])
            batch = ({"inputs": inputs, "targets": said}, labels, weights)
            if weights is not None:
                return batch
            return batch[:1] if labels is None else batch[:2]

        found = self._mapped(batches, [*examples.columns, *targets], assembled)
        found = found.apply(tf.data.experimental.assert_cardinality(self.num_batches))
        options = tf.data.Options()
        # Batches come from Python, so that there are no files which workers could share out.
        options.experimental_distribute.auto_shard_policy = (
            tf.data.experimental.AutoShardPolicy.DATA
        )
        return found.prefetch(2).with_options(options)

    def check(self) -> None:
        """Sees that the view repeats itself, and that teachers say now what is on disk.

        Raises:
          InputError: when it is not so.
        """
        targets = self._targets()
        for column in targets:
            column.check()
        if self._view is not None:
            self._check_view()
        num_done = min(self._record["num_done"], self._batch_size, self.num_examples)
        if not num_done:
            return
        template, leaves = take_apart(next(iter(self._asked_about(0))))
        inputs = put_together(template, [leaf[:num_done] for leaf in leaves])
        said = self._said(inputs, 0, num_done)
        for name, column, now in zip(names(self._record["targets"]), targets, said, strict=True):
            moved = _distance(column[:num_done], now)
            if not moved <= TOLERANCE:
                raise InputError(
                    f"{_title(name)} of the first {num_done} examples moved by {moved:.2g} of its "
                    f"deviation from what the cache in {self._folder} holds, where rounding moves "
                    f"it by {TOLERANCE} at most: a preprocessing or the view has changed; {FIX}."
                )

    def _check_view(self) -> None:
        # Each time it is traced anew, so that random numbers of Python differ, too.
        first, again = (take_apart(next(iter(self._asked_about(0))))[1] for _ in range(2))
        size = min(self._batch_size, self.num_examples)
        if len(first[0]) != size:
            raise InputError(f"The view makes {len(first[0])} examples of {size}; expected {size}.")
        for one, other in zip(first, again, strict=True):
            if one.shape != other.shape or one.numpy().tobytes() != other.numpy().tobytes():
                raise InputError(
                    "The view makes other inputs when it gets the same seed again; draw random "
                    "numbers with tf.random.stateless_… and that seed."
                )

    def _fill(self, progress: Progress) -> None:
        num_before = num_done = self._record["num_done"]
        num_new = self._num_targets - num_before
        num_parts, num_finished = min(NUM_PARTS, -(-num_new // self._batch_size)), 0
        kind = "examples" if self._view is None else "views of examples"
        what = f"of {self._num_targets:,} {kind} asked about"
        if num_before:
            progress.say(f"{num_before:,} {what} in an earlier run.")
        progress.start(num_parts)
        with TargetWriter(self._folder, self._record) as writer:
            for inputs in self._asked_about(num_before):
                progress.doing(f"{num_done:,} {what}")
                num_examples = len(take_apart(inputs)[1][0])
                writer.append(self._said(inputs, num_done, num_done + num_examples))
                num_done += num_examples
                part = (num_done - num_before) * num_parts // num_new
                for _ in range(num_finished, part):
                    progress.finish(f"{num_done:,} {what}")
                num_finished = part

    def _asked_about(self, num_done: int) -> Any:
        """A tf.data.Dataset of what teachers are asked about after so many examples."""

        def batches() -> Iterator[tuple[np.ndarray, ...]]:
            place = num_done
            while place < self._num_targets:
                turn, begin = divmod(place, self.num_examples)
                stop = min(begin + self._batch_size, self.num_examples)
                rows = slice(begin, stop) if self._view is None else self._order(turn, begin, stop)
                columns = [column[rows] for column in self._examples.columns]
                yield (*columns, self._batch_seed(turn, begin))
                place += stop - begin

        def inputs(*leaves: Any) -> Any:
            return self._viewed(leaves)[0]

        return self._mapped(batches, self._examples.columns, inputs).prefetch(2)

    def _mapped(
        self,
        batches: Callable[[], Iterator[Any]],
        columns: Sequence[Any],
        function: Callable[..., Any],
    ) -> Any:
        """What a function makes of columns and a seed.

        Teachers and student both get their inputs from here, so that views are the same to the bit.
        """
        import tensorflow as tf

        specs = [tf.TensorSpec((None, *column.shape[1:]), column.dtype) for column in columns]
        found = tf.data.Dataset.from_generator(
            batches, output_signature=(*specs, tf.TensorSpec((2,), tf.int32))
        )
        return found.map(function, None if self._view is None else tf.data.AUTOTUNE)

    def _viewed(self, leaves: Sequence[Any]) -> tuple[Any, Any, Any]:
        inputs, labels, weights = put_together(self._examples.template, leaves)
        if self._view is not None:
            # tf.data makes a tensor of a list, and here it becomes a tuple.
            made = self._view(inputs, labels, leaves[-1])
            inputs, labels = put_together(*take_apart(made))
        return inputs, labels, weights

    def _order(self, turn: int, begin: int, stop: int) -> np.ndarray:
        return permuted(np.arange(begin, stop), self.num_examples, self._seed, turn)

    def _batch_seed(self, turn: int, begin: int) -> np.ndarray:
        text = f"view {self._seed} {turn} {begin // self._batch_size}"
        return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), "<i4")

    def _targets(self) -> list[Rows]:
        columns, num_done = self._record["columns"], self._record["num_done"]
        return open_rows(self._folder / TARGETS, columns, num_done) if num_done else []

    def _said(self, inputs: Any, begin: int, stop: int) -> list[np.ndarray]:
        """What teachers say about examples `begin` to `stop`, checked."""
        template, leaves = take_apart(self._ask(inputs))
        arrays = [np.asarray(leaf) for leaf in leaves]
        if not arrays:
            raise InputError("The teachers return nothing; expected at least one tensor.")
        for name, array in zip(names(template), arrays, strict=True):
            if not is_number(array.dtype):
                raise InputError(f"{_title(name)} has dtype {array.dtype}; expected numbers.")
            if not array.size or array.shape[:1] != (stop - begin,):
                raise InputError(
                    f"{_title(name)} has shape {array.shape} for {stop - begin} examples; expected "
                    "a row for each."
                )
            if is_float(array.dtype) and not (is_finite := np.isfinite(array)).all():
                raise InputError(
                    f"{_title(name)} is not finite in {1 - is_finite.mean():.1%} of its values "
                    f"for examples {begin} to {stop - 1}; look at the preprocessing and the "
                    "weights of the teachers."
                )
        arrays = [
            array.astype(np.float32) if array.dtype == np.float64 else array for array in arrays
        ]
        form = {"targets": template, "columns": describe(arrays)}
        if not self._record["num_done"] and not begin:
            self._record |= form
        kept = {name: self._record[name] for name in form}
        if form != kept:
            where, old, new = difference(kept, form)
            raise InputError(
                f"Targets have another form than those in {self._folder}: {where} was {old} and is "
                f"{new}; return the same for each batch, or {FIX}."
            )
        return arrays


def _title(name: str) -> str:
    return f"Target {name!r}" if name else "The target"


def _distance(kept: np.ndarray, now: np.ndarray) -> float:
    """How far targets moved: root mean square, as a share of their deviation between examples.

    Rounding of the dtype they are kept in is allowed for. Of whole numbers, the share that differ.
    """
    import ml_dtypes

    if not is_float(kept.dtype):
        return float(np.mean(kept != now))
    rounding = 2 * float(ml_dtypes.finfo(kept.dtype).eps)
    kept, now = kept.astype(np.float64), now.astype(np.float64)
    size, deviation = _rms(kept), _rms(kept - kept.mean(0))
    moved = max(0.0, _rms(now - kept) - rounding * size)
    # What is the same for all examples, or said about one only, is held against its size.
    scale = deviation if deviation > rounding * size else size
    return moved / scale if scale else float(moved > 0)


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
