"""What shapes a search besides model, data and budget."""

from __future__ import annotations

import dataclasses

from tfopt import dataset as datasets
from tfopt import runtimes
from tfopt.errors import InputError
from tfopt.graph import SIGNATURE_KEY
from tfopt.isolation import Limits
from tfopt.measure import latency, metric_names
from tfopt.search import students


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything besides model, data and budget that shapes a search.

    Attributes:
      variants: variants and patterns to try; None is everything that suits this machine.
      metric: a name, a function of outputs and labels, a Keras metric, or a dict with one of these
        for each output; None chooses by the labels. It is kept as its name; see
        `tfopt.measure.metric_names`.
      output_name: the only output that is looked at, where the model has several.
      batch_size: of the timing.
      num_threads: of every runtime; None is every core that this process may use.
      seed: of the split and of the order of timings.
      signature: of a SavedModel.
      custom_objects: module with the Keras layers and functions that the file needs.
      import_modules: modules that register TensorFlow custom ops.
      trust_model: whether Python code that is stored in a Keras file (a Lambda layer) may run.
      num_calibration: examples to calibrate with.
      max_timing_s: seconds after which a timing ends, however wide its interval.
      interval_width: of a speed-up's 95 % interval, as a share of it; a timing ends when it is
        as narrow as that.
      limits: for each conversion and each measurement.
      distill: students to distil from the model and to try like it; see `make_student`.
      distill_epochs: of their training.
      distill_alpha: share of the labels' loss; see `tfopt.Distiller`.
      distill_temperature: of soft targets.
      distill_batch_size: examples in a step.
    """

    variants: tuple[str, ...] | None = None
    metric: str | None = None
    output_name: str | None = None
    batch_size: int = 1
    num_threads: int | None = None
    seed: int = 0
    signature: str = SIGNATURE_KEY
    custom_objects: str | None = None
    import_modules: tuple[str, ...] = ()
    trust_model: bool = False
    num_calibration: int = datasets.NUM_CALIBRATION
    max_timing_s: float = latency.MAX_S
    interval_width: float = latency.INTERVAL_WIDTH
    limits: Limits = dataclasses.field(default_factory=Limits)
    distill: tuple[str, ...] = ()
    distill_epochs: int = 20
    distill_alpha: float = 0.1
    distill_temperature: float = 4.0
    distill_batch_size: int = 64

    def __post_init__(self) -> None:
        for name in (
            "batch_size", "num_threads", "num_calibration", "distill_epochs", "distill_batch_size"
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"{name} is {value!r}; expected a whole number of at least 1.")
        latency.check_limits(self.max_timing_s, self.interval_width)
        if self.variants is not None:
            runtimes.expand(self.variants)
        students.names(self.distill)
        object.__setattr__(self, "metric", metric_names.name_of(self.metric))
