"""tfopt: the fastest version of a TensorFlow or Keras model inside an accuracy budget.

    result = tfopt.optimize("saved_model", "data.npz", tfopt.Budget(max_accuracy_drop=0.01))
    session = result.load()
    outputs = session.run({"image": images})

Importing this package imports neither TensorFlow nor pandas nor NumPy; each name below loads what
it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Artifact": "tfopt.artifact",
    "BackupAndRestore": "tfopt.train.backup",
    "Budget": "tfopt.search.budget",
    "Comparison": "tfopt.compare.comparison",
    "ConversionError": "tfopt.errors",
    "Diagnosis": "tfopt.measure.diagnosis",
    "Distillation": "tfopt.distillation.distill",
    "Distiller": "tfopt.distillation.distiller",
    "EngineOptions": "tfopt.trt.spec",
    "FeaturePair": "tfopt.distillation.objective",
    "InputError": "tfopt.errors",
    "OptimizeCallback": "tfopt.callback",
    "PrecisionAdvice": "tfopt.train.recommendation",
    "PrecisionProfile": "tfopt.train.profile",
    "PrecisionWatch": "tfopt.train.watch",
    "Profile": "tfopt.trt.profiles",
    "Result": "tfopt.search.optimize",
    "ResultError": "tfopt.errors",
    "Session": "tfopt.runtimes.base",
    "Teacher": "tfopt.distillation.teacher",
    "Training": "tfopt.train.fine_tune",
    "Variant": "tfopt.variant",
    "benchmark": "tfopt.api",
    "convert": "tfopt.api",
    "diagnose": "tfopt.api",
    "distill": "tfopt.distillation.distill",
    "fine_tune": "tfopt.train.fine_tune",
    "inspect": "tfopt.inspection",
    "load": "tfopt.api",
    "make_student": "tfopt.distillation.students",
    "optimize": "tfopt.search.optimize",
    "precision": "tfopt.train.precision",
    "profile_precision": "tfopt.train.profile",
    "rebuild": "tfopt.api",
    "recommend_precision": "tfopt.train.recommendation",
    "reestimate_batchnorm": "tfopt.train.batchnorm",
    "runtimes": "tfopt.runtimes",
    "set_precision": "tfopt.train.precision",
}

__all__ = [
    "Artifact",
    "BackupAndRestore",
    "Budget",
    "Comparison",
    "ConversionError",
    "Diagnosis",
    "Distillation",
    "Distiller",
    "EngineOptions",
    "FeaturePair",
    "InputError",
    "OptimizeCallback",
    "PrecisionAdvice",
    "PrecisionProfile",
    "PrecisionWatch",
    "Profile",
    "Result",
    "ResultError",
    "Session",
    "Teacher",
    "Training",
    "Variant",
    "benchmark",
    "convert",
    "diagnose",
    "distill",
    "fine_tune",
    "inspect",
    "load",
    "make_student",
    "optimize",
    "precision",
    "profile_precision",
    "rebuild",
    "recommend_precision",
    "reestimate_batchnorm",
    "runtimes",
    "set_precision",
]

if TYPE_CHECKING:
    from tfopt import runtimes
    from tfopt.api import benchmark, convert, diagnose, load, rebuild
    from tfopt.artifact import Artifact
    from tfopt.callback import OptimizeCallback
    from tfopt.compare.comparison import Comparison
    from tfopt.distillation.distill import Distillation, distill
    from tfopt.distillation.distiller import Distiller
    from tfopt.distillation.objective import FeaturePair
    from tfopt.distillation.students import make_student
    from tfopt.distillation.teacher import Teacher
    from tfopt.errors import ConversionError, InputError, ResultError
    from tfopt.inspection import inspect
    from tfopt.measure.diagnosis import Diagnosis
    from tfopt.runtimes.base import Session
    from tfopt.search.budget import Budget
    from tfopt.search.optimize import Result, optimize
    from tfopt.train.backup import BackupAndRestore
    from tfopt.train.batchnorm import reestimate_batchnorm
    from tfopt.train.fine_tune import Training, fine_tune
    from tfopt.train.precision import precision, set_precision
    from tfopt.train.profile import PrecisionProfile, profile_precision
    from tfopt.train.recommendation import PrecisionAdvice, recommend_precision
    from tfopt.train.watch import PrecisionWatch
    from tfopt.trt.profiles import Profile
    from tfopt.trt.spec import EngineOptions
    from tfopt.variant import Variant


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tfopt' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    return module if _HOMES[name] == f"tfopt.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
