"""Optimizing at the end of training."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from tfopt import live
from tfopt.errors import InputError
from tfopt.first_examples import first_examples
from tfopt.keras_callback import KerasCallback
from tfopt.search.budget import Budget
from tfopt.search.optimize import Result, check_arguments, optimize


class OptimizeCallback(KerasCallback):
    """Runs `tfopt.optimize` on the model when `fit` ends; `result` has the outcome.

        best = tfopt.OptimizeCallback((x_test, y_test), output_dir="optimized")
        model.fit(x_train, y_train, epochs=10, callbacks=[best])
        session = best.result.load()

    Arguments are checked when training begins. Callbacks that restore the best weights, such as
    `EarlyStopping(restore_best_weights=True)`, end before this one wherever they are listed, so
    that the model that `fit` leaves is the one that is optimized.

    Args:
      data, budget, output_dir, **options: as `tfopt.optimize` takes them.

    Attributes:
      result: the outcome; None until training has ended.

    Raises:
      InputError: when training begins, for a wrong option, budget or output folder, or data that
        the model cannot run on.
    """

    def __init__(
        self,
        data: Any,
        budget: Budget | None = None,
        output_dir: str | Path = "optimized",
        **options: Any,
    ):
        super().__init__()
        self.result: Result | None = None
        self._data, self._budget, self._output_dir = data, budget, output_dir
        self._options = options

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        """Checks the arguments, and takes its place behind callbacks that restore weights."""
        check_arguments(self._budget, self._output_dir, **self._options)
        self._check_data()
        frame = inspect.currentframe()
        caller = frame.f_back if frame is not None else None
        if caller is not None:
            self._follow_restoring(caller.f_locals.get("self"))

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        """Optimizes the trained model."""
        self.result = optimize(
            self.model, self._data, self._budget, self._output_dir, **self._options
        )

    def _check_data(self) -> None:
        """Runs the model on the first examples, where it is known what it takes."""
        inputs = getattr(self.model, "inputs", None)
        example = first_examples(self._data, len(inputs)) if inputs else None
        if example is None:
            return
        if (reason := live.failure_on(self.model, example)) is not None:
            raise InputError(
                f"Model {self.model.name!r} cannot run on the data of OptimizeCallback: {reason}; "
                "give data as predict takes them."
            )

    def _follow_restoring(self, caller: Any) -> None:
        """Moves behind the last callback that restores weights in the list that is calling.

        Keras shows callbacks neither the list nor a hook after the last `on_train_end`.
        """
        listed = getattr(caller, "callbacks", None)
        if not isinstance(listed, list) or self not in listed:
            return
        restoring = [i for i, each in enumerate(listed) if _restores(each)]
        place = listed.index(self)
        if restoring and restoring[-1] > place:
            last = restoring[-1]
            # A new list, since Keras is in the middle of the old one.
            caller.callbacks = [
                *listed[:place],
                *listed[place + 1 : last + 1],
                self,
                *listed[last + 1 :],
            ]


def _restores(callback: Any) -> bool:
    return bool(getattr(callback, "restore_best_weights", False))
