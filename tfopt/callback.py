"""Optimizing at the end of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tfopt.keras_callback import KerasCallback
from tfopt.search.budget import Budget
from tfopt.search.optimize import Result, optimize


class OptimizeCallback(KerasCallback):
    """Runs `tfopt.optimize` on the model when `fit` ends; `result` has the outcome.

        best = tfopt.OptimizeCallback((x_test, y_test), output_dir="optimized")
        model.fit(x_train, y_train, epochs=10, callbacks=[best])
        session = best.result.load()

    Args:
      data, budget, output_dir, **options: as `tfopt.optimize` takes them.
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
        self._arguments = (data, budget, output_dir)
        self._options = options

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        """Optimizes the trained model."""
        self.result = optimize(self.model, *self._arguments, **self._options)
