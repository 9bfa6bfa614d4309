"""What every runtime offers, and the decorator that declares a precision.

A runtime is one file: a subclass of `Runtime` whose methods are decorated with `precision`. The
registry in `tfopt.runtimes`, the search, the command line and the golden tests pick it up.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib.metadata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from tfopt.artifact import Artifact
from tfopt.errors import ConversionError, InputError
from tfopt.graph import SIGNATURE_KEY
from tfopt.measure.suitability import Suitability
from tfopt.signature import Signature
from tfopt.trt.spec import EngineOptions
from tfopt.variant import Value, Variant

if TYPE_CHECKING:
    from tfopt.source import Source

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass
class Conversion:
    """Everything that one conversion may use.

    Attributes:
      source: the model that came in.
      folder: where the files go; empty at the start.
      parent: the converted model that this precision starts from, if it names one.
      batch_size: for runtimes that need a fixed one.
      calibration: real examples, batches of `batch_size`; None without data.
      num_calibration: how many examples that are.
      notes: sentences for the user; append to it.
      signature: of the result; change it when it differs from the source's.
      engine: what the user said of TensorRT engines.
      shapes: arrays of the shapes that batches of all examples have, those of evaluation too,
        without their values; None without data.
      count_shapes: how many calibration examples have which shapes of inputs, in the order of the
        signature and without a batch dimension; None without data.
      needs: what a processor must have for the outputs to be right, see `Artifact.needs`; append
        to it.
    """

    source: Source
    folder: Path
    parent: Artifact | None
    batch_size: int
    calibration: Callable[[], Iterator[Arrays]] | None
    notes: list[str]
    signature: Signature
    num_calibration: int = 0
    engine: EngineOptions = dataclasses.field(default_factory=EngineOptions)
    shapes: Callable[[], Iterator[Arrays]] | None = None
    count_shapes: Callable[[], Counter[tuple[tuple[int, ...], ...]]] | None = None
    needs: list[str] = dataclasses.field(default_factory=list)

    def calibration_batches(self, at_least: int = 1) -> Iterator[Arrays]:
        """Real examples to calibrate with.

        Args:
          at_least: examples without which a calibration would be chance.

        Raises:
          ConversionError: when there are none, or fewer.
        """
        if self.calibration is None:
            raise ConversionError(
                "This precision is calibrated on real examples and none were set aside; give more "
                "`data`."
            )
        if self.num_calibration < at_least:
            raise ConversionError(
                f"It is calibrated on {self.num_calibration} examples and needs at least "
                f"{at_least}; give more `data`, or raise `num_calibration`."
            )
        return self.calibration()


@dataclasses.dataclass(frozen=True)
class WholeNumber:
    """The values of an option that is a count.

    Attributes:
      default: what it is when not given; None leaves it to the runtime.
      minimum: the smallest that makes sense.
    """

    default: int | None
    minimum: int = 1

    def accepts(self, value: Value) -> bool:
        """Whether the value is one of them."""
        return isinstance(value, int) and not isinstance(value, bool) and value >= self.minimum

    def __str__(self) -> str:
        default = "" if self.default is None else f", {self.default} by default"
        return f"a whole number of at least {self.minimum}{default}"


@dataclasses.dataclass(frozen=True)
class OneOf:
    """The values of an option that are few; the first is the default."""

    values: tuple[Value, ...]

    @property
    def default(self) -> Value:
        """What it is when not given."""
        return self.values[0]

    def accepts(self, value: Value) -> bool:
        """Whether the value is one of them."""
        is_bool = isinstance(self.default, bool)
        return value in self.values and isinstance(value, bool) == is_bool

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.values))}"


@dataclasses.dataclass(frozen=True)
class Precision:
    """One precision of one runtime, as declared by the `precision` decorator.

    Attributes:
      name: for example `int8`.
      method: the runtime's method that converts.
      options: allowed values of each option.
      tried: option sets that a search tries.
      parent: the precision on the same runtime that this one starts from.
      kinds: the kinds of source that it takes.
      is_calibrated: whether it needs examples.
      is_unchanged: whether the numbers stay as in the source, so that it can be a baseline.
      is_batch_dependent: whether outputs depend on what else is in the batch.
      suitability: returns whether this machine gains from it, so that a search tries it; None
        for precisions that every machine may gain from.
    """

    name: str
    method: str
    options: Mapping[str, OneOf | WholeNumber]
    tried: tuple[Mapping[str, Value], ...]
    parent: str | None
    kinds: tuple[str, ...]
    is_calibrated: bool
    is_unchanged: bool
    is_batch_dependent: bool
    suitability: Callable[[], Suitability] | None


def precision(
    name: str,
    *,
    options: Mapping[str, tuple[Value, ...] | WholeNumber] | None = None,
    tried: Iterable[Mapping[str, Value]] = ({},),
    parent: str | None = None,
    kinds: Iterable[str] = ("saved_model",),
    is_calibrated: bool = False,
    is_unchanged: bool = False,
    is_batch_dependent: bool = False,
    suitability: Callable[[], Suitability] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declares a method as a precision of its runtime; arguments as in `Precision`.

    Of an option with few values, they are given as a tuple, the default first.
    """
    declared = {
        key: OneOf(values) if isinstance(values, tuple) else values
        for key, values in (options or {}).items()
    }

    def decorate(method: Callable[..., None]) -> Callable[..., None]:
        method.__dict__["precision"] = Precision(
            name, method.__name__, declared, tuple(tried), parent, tuple(kinds),
            is_calibrated, is_unchanged, is_batch_dependent, suitability,
        )  # fmt: skip
        return method

    return decorate


@dataclasses.dataclass(frozen=True)
class Layer:
    """One operation as a runtime executes it, after its own fusions.

    Attributes:
      name: in the runtime's graph.
      op: what it does, as the runtime names it.
      dtype: that it computes in; empty where the runtime does not say.
      time_ms: in one inference; None where the runtime has no profiler.
      executor: whose kernels compute it, where there are several.
      is_fallback: whether those are not the ones that the runtime is fast with.
    """

    name: str
    op: str
    dtype: str
    time_ms: float | None = None
    executor: str = ""
    is_fallback: bool = False


@dataclasses.dataclass(frozen=True)
class Activation:
    """What a tensor inside a model held for one batch.

    Attributes:
      name: of the tensor, the same in the float32 variant of the runtime.
      values: float32, after quantization where it is quantized.
      limits: lowest and highest value that its quantization has; None where it has none.
      channel_axis: of a layer's channels; None where the tensor has no channels.
    """

    name: str
    values: np.ndarray
    limits: tuple[float, float] | None
    channel_axis: int | None


class Session(abc.ABC):
    """A loaded artifact that runs; a context manager.

    `run` takes and returns host arrays, so that a timing of it contains every copy.
    """

    def __init__(self, artifact: Artifact):
        self.artifact = artifact
        self.signature = artifact.signature

    @abc.abstractmethod
    def run(self, inputs: Arrays) -> Arrays:
        """Runs the model once.

        Args:
          inputs: one array for each input of the signature, with its dtype.

        Returns:
          One new array for each output of the signature.

        Raises:
          InputError: when names, shapes or dtypes do not fit.
        """

    def device_seconds(self, inputs: Arrays, num_runs: int) -> list[float] | None:
        """Seconds without copies: inputs lie on the GPU already, outputs stay there.

        By CUDA events around each run, where the runtime lets its stream be seen. `run` says what
        a caller waits for; this is how much of that is left without copies. The waits of the GPU
        for the next launch are in it, so that it is an upper bound of the GPU's own work: for
        small batches of a runtime that launches every operation it is mostly launching.

        Args:
          inputs: as `run` takes them.
          num_runs: how many times are wanted; a few come before, uncounted.

        Returns:
          The times; None where nothing runs on a GPU, or the runtime does not tell.
        """
        del inputs, num_runs
        return None

    @abc.abstractmethod
    def close(self) -> None:
        """Releases the model; the session cannot run after this."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def check_inputs(self, inputs: Arrays, error: BaseException | None = None) -> None:
        """Whether the inputs fit: called when the runtime failed, or would not notice.

        Args:
          inputs: as `run` got them.
          error: of the runtime.

        Raises:
          InputError: when names, shapes or dtypes do not fit the signature.
        """
        try:
            got = ", ".join(f"{name} {x.dtype} {x.shape}" for name, x in inputs.items())
            fits = set(inputs) == set(self.signature.input_names) and all(
                spec.accepts(inputs[spec.name]) for spec in self.signature.inputs
            )
        except AttributeError:
            got, fits = f"{type(inputs).__name__} of something else than arrays", False
        if not fits:
            want = ", ".join(map(str, self.signature.inputs))
            raise InputError(
                f"The inputs do not fit: got {got or 'nothing'}; expected {want}."
            ) from error


class Runtime(abc.ABC):
    """Converts models and runs them; one instance for each runtime lives in the registry.

    Attributes:
      name: as in a variant's name.
      packages: distributions whose versions are recorded.
      library: the module that its sessions import.
      shares_threads: whether all sessions of a process share one pool of threads, so that several
        can be timed in one process without disturbing each other.
      has_engines: whether its artifacts hold TensorRT engines, which belong to one GPU.
      opens_once: whether a process can hold an artifact open only once; its session takes calls
        from several threads.
      has_own_cuda: whether it brings CUDA libraries that may be of another version than
        TensorFlow's, so that the two are not run in one process on a machine with a GPU.
      precisions: filled from the decorated methods.
    """

    name: str
    packages: tuple[str, ...]
    library: str
    shares_threads = False
    has_engines = False
    opens_once = False
    has_own_cuda = False
    precisions: dict[str, Precision]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        declared = (vars(method).get("precision") for method in vars(cls).values()
                    if callable(method))  # fmt: skip
        cls.precisions = {item.name: item for item in declared if item is not None}

    @abc.abstractmethod
    def missing(self) -> str | None:
        """Why this runtime cannot be used here and what to install; None when it can."""

    @abc.abstractmethod
    def load(self, artifact: Artifact, num_threads: int | None) -> Session:
        """Opens an artifact of this runtime.

        Args:
          artifact: what to load.
          num_threads: threads inside the runtime; None leaves the runtime's own default.
        """

    def remarks(self) -> list[str]:
        """How it runs here, where that is not plain: on which device, with which libraries."""
        return []

    def suitability(self, variant: Variant) -> Suitability | None:
        """Whether this machine gains from a variant; None where every machine may.

        By its precision; a runtime overrides this where an option matters, too.
        """
        found = self.precision_of(variant).suitability
        return None if found is None else found()

    def rebuild(self, artifact: Artifact, folder: Path) -> list[str]:
        """Builds engines anew for this machine, from what the artifact holds.

        Only of runtimes that have engines.

        Args:
          artifact: made by this runtime, anywhere.
          folder: where the files go; empty at the start.

        Returns:
          Sentences for the user.

        Raises:
          ConversionError: when they cannot be built here.
        """
        raise NotImplementedError

    def layers(
        self, artifact: Artifact, batches: Sequence[Arrays], num_threads: int | None
    ) -> list[Layer]:
        """What an artifact of this runtime executes, in order; empty when that cannot be seen.

        Times are by the runtime's own profiler, which slows down what it measures.

        Args:
          artifact: what to look into.
          batches: inputs of one shape; the first is run once more to begin with, uncounted where
            the profiler can tell runs apart.
          num_threads: threads inside the runtime; None leaves the runtime's own default.
        """
        del artifact, batches, num_threads
        return []

    def activations(self, artifact: Artifact, batches: Iterable[Arrays]) -> Iterator[Activation]:
        """What the tensors inside hold, batch by batch; nothing when that cannot be seen."""
        del artifact, batches
        return iter(())

    def read_signature(self, path: Path, key: str = SIGNATURE_KEY) -> Signature:
        """The signature of a model file in this runtime's own format.

        Args:
          path: the file.
          key: which signature, in formats that have several.

        Raises:
          InputError: when the file is damaged or has no such signature, or the runtime has no
            format of its own.
        """
        del key
        raise InputError(f"{path} cannot be read by {self.name}; it has no file format of its own.")

    def versions(self) -> dict[str, str]:
        """Versions of the packages that convert and run."""
        found = {}
        for package in self.packages:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found

    def precision_of(self, variant: Variant) -> Precision:
        """The declaration behind a variant.

        Raises:
          InputError: when the precision, an option or its value is unknown; lists the valid ones.
        """
        if variant.precision not in self.precisions:
            raise InputError(
                f"Unknown precision {variant.precision!r} in {variant}; {self.name} has: "
                f"{', '.join(self.precisions)}."
            )
        found = self.precisions[variant.precision]
        for name, value in variant.options:
            if name not in found.options:
                valid = ", ".join(found.options) or "none"
                raise InputError(
                    f"Unknown option {name!r} in {variant}; {found.name}@{self.name} has: {valid}."
                )
            if not found.options[name].accepts(value):
                raise InputError(f"Unknown value in {variant}: {name} is {found.options[name]}.")
        return found

    def canonical(self, variant: Variant) -> Variant:
        """The variant without options that only repeat a default."""
        declared = self.precision_of(variant).options
        return dataclasses.replace(
            variant,
            options=tuple((name, v) for name, v in variant.options if v != declared[name].default),
        )

    def parent(self, variant: Variant) -> Variant | None:
        """The variant that this one is converted from, None when that is the source."""
        parent = self.precision_of(variant).parent
        return None if parent is None else Variant(parent, self.name, student=variant.student)

    def convert(self, variant: Variant, conversion: Conversion) -> None:
        """Writes the model files of a variant into `conversion.folder`.

        Raises:
          ConversionError: when the model cannot be converted; one sentence says why.
        """
        declared = self.precision_of(variant)
        if conversion.source.kind not in declared.kinds:
            raise ConversionError(
                f"{variant} cannot start from a .{conversion.source.kind} file; it needs "
                f"{' or '.join(declared.kinds)}."
            )
        options = {name: values.default for name, values in declared.options.items()}
        options.update(variant.options)
        getattr(self, declared.method)(conversion, **options)
