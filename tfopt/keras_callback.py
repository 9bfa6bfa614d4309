"""What callbacks for `fit` of either Keras descend from."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_Base: Any = object if TYPE_CHECKING else importlib.import_module("keras").callbacks.Callback


class KerasCallback(_Base):
    """A callback of Keras 3 that `fit` of tf_keras takes, too, whenever that is imported.

    tf_keras asks its callbacks whether they want to hear of batches.
    """

    def _implements_train_batch_hooks(self) -> bool:
        return type(self).on_train_batch_end is not _Base.on_train_batch_end

    def _implements_test_batch_hooks(self) -> bool:
        return False

    def _implements_predict_batch_hooks(self) -> bool:
        return False
