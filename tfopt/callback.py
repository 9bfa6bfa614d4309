"""Optimizing at the end of training."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfopt.search.budget import Budget
from tfopt.search.optimize import Result, optimize

if TYPE_CHECKING:
    _Base: Any = object
else:
    # One class serves `fit` of Keras 3 and, where that is in use, of tf_keras.
    _Callback = importlib.import_module("keras").callbacks.Callback
    _legacy = sys.modules.get("tf_keras")
    _bases = [_Callback] if _legacy is None else [_Callback, _legacy.callbacks.Callback]
    _Base = type("_Base", tuple(dict.fromkeys(_bases)), {})


class OptimizeCallback(_Base):
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
