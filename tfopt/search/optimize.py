"""The main job: from a model to the fastest version inside the budget, with the proof."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfopt import runtimes
from tfopt import source as sources
from tfopt.artifact import Artifact
from tfopt.compare.comparison import Comparison
from tfopt.errors import InputError, ResultError
from tfopt.progress import Progress
from tfopt.search.budget import Budget
from tfopt.search.ledger import FILE_NAME as LEDGER
from tfopt.search.options import Options
from tfopt.search.search import Search

if TYPE_CHECKING:
    import pandas as pd

    from tfopt.runtimes.base import Session

CONTENTS = (
    "artifacts", "best", "data", "evaluations", "logs", "source", "source_export", "timings",
    LEDGER, "results.csv", "results.json", "report.html",
)  # fmt: skip
# Names of flags that differ from those of fields.
FLAGS = {
    "import_modules": "import_module",
    "timeout_s": "step_timeout_s",
    "memory_bytes": "memory_limit_bytes",
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
      output_dir: holds `best/`, `results.csv`, `results.json` and `report.html`.
      best: the artifact to ship, in `best/`; None when nothing meets the limits.
      comparison: the table and everything behind it.
    """

    output_dir: Path
    best: Artifact | None
    comparison: Comparison

    @property
    def summary(self) -> str:
        """What was chosen and why, in a few sentences."""
        return self.comparison.summary

    @property
    def table(self) -> pd.DataFrame:
        """One row a variant, failures included; columns as in `results.csv`."""
        return self.comparison.table

    def load(self) -> Session:
        """A session of the best version.

        Raises:
          ResultError: when nothing met the limits.
        """
        if self.best is None:
            raise ResultError(self.summary)
        return runtimes.load(self.best)


def optimize(
    model: Any,
    data: Any,
    budget: Budget | None = None,
    output_dir: str | Path = "optimized",
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    **options: Any,
) -> Result:
    """Finds the fastest version of a model that stays inside a budget on this machine.

    Every variant is converted in a child process, run over the evaluation examples, and timed
    against the fastest unchanged way of running the model, in turns with it. A variant
    that fails is a row with its reason. Finished steps are on disk: an interrupted search goes on
    with `resume=True`.

    Args:
      model: path to a SavedModel folder, .keras, .h5, .tflite or .onnx; or a built Keras 3 or
        tf_keras model, or a tf.function with an input signature.
      data: see `tfopt.dataset.write`; labels are needed for a metric, without them variants are
        compared with the baseline's own outputs.
      budget: limits; by default at most one point of accuracy.
      output_dir: empty or new.
      resume: go on with an output folder of the same source, data and options.
      overwrite: delete what an earlier search left in the output folder.
      quiet: print no progress.
      **options: fields of `tfopt.search.options.Options`.

    Raises:
      InputError: for a wrong model, data, option or output folder.
      ResultError: when the model itself does not run.
    """
    unknown = sorted(set(options) - {field.name for field in dataclasses.fields(Options)})
    if unknown:
        valid = ", ".join(field.name for field in dataclasses.fields(Options))
        raise InputError(f"Unknown option {', '.join(unknown)}; the options are: {valid}.")
    for name in ("variants", "import_modules"):
        if options.get(name) is not None:
            options[name] = tuple(options[name])
    chosen = Options(**options)
    if isinstance(model, (str, Path)):
        model = sources.check_path(model)
    folder = claim_folder(Path(output_dir), resume, overwrite)
    is_tensorflow = not (isinstance(model, Path) and model.suffix in (".tflite", ".onnx"))
    budget = budget or Budget()
    command = _command(model, data, folder, budget, chosen)
    search = Search(folder, chosen, Progress(quiet), is_tensorflow, command)
    return Result(folder, *search.run(model, data, budget))


def _command(model: Any, data: Any, folder: Path, budget: Budget, options: Options) -> str | None:
    """What does the same from a shell; None for objects that only Python has."""
    if not isinstance(model, Path) or not isinstance(data, (str, Path)):
        return None
    given: dict[str, Any] = {"model": model, "data": data, "output_dir": folder}
    for value in (budget, options, options.limits):
        for field in dataclasses.fields(value):
            found = getattr(value, field.name)
            is_default = found == field.default or field.name == "limits"
            if not is_default:
                given[FLAGS.get(field.name, field.name)] = (
                    ",".join(found) if isinstance(found, tuple) else found
                )
    return shlex.join(["tfopt", "optimize", *(f"--{k}={v}" for k, v in given.items())])


def claim_folder(folder: Path, resume: bool, overwrite: bool) -> Path:
    """Makes the output folder, and empties it if that was asked for.

    Raises:
      InputError: when it holds something and neither was asked for, holds what tfopt did not
        write, or cannot be written.
    """
    folder = folder.absolute()
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other; give one.")
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; --output_dir must be a folder.")
        is_full = folder.exists() and any(folder.iterdir())
        if resume and not (folder / LEDGER).is_file():
            raise InputError(f"Nothing to resume in {folder}: it holds no {LEDGER}.")
        if is_full and overwrite:
            _empty(folder)
        elif is_full and not resume:
            raise InputError(
                f"{folder} is not empty; give --resume to go on with it, --overwrite to start "
                "again, or another --output_dir."
            )
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-{time.monotonic_ns()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}); name another --output_dir."
        ) from error
    return folder


def _empty(folder: Path) -> None:
    """Deletes what a search wrote, and only that.

    A search that ended before its ledger began leaves logs and source behind, so that one of the
    two must be there.
    """
    if not ((folder / LEDGER).is_file() or (folder / "logs" / "convert.log").is_file()):
        raise InputError(
            f"{folder} was not written by tfopt, so --overwrite leaves it alone; name another "
            "--output_dir."
        )
    for name in CONTENTS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
