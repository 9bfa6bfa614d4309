"""The main job: from a model to the fastest version inside the budget, with the proof."""

from __future__ import annotations

import dataclasses
import html
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfopt import main_module, runtimes
from tfopt import source as sources
from tfopt.artifact import Artifact
from tfopt.compare.comparison import Comparison
from tfopt.errors import InputError, ResultError
from tfopt.output_folder import Contents
from tfopt.progress import Progress
from tfopt.search.budget import Budget
from tfopt.search.ledger import FILE_NAME as LEDGER
from tfopt.search.options import Options
from tfopt.search.search import Search

if TYPE_CHECKING:
    import pandas as pd

    from tfopt.runtimes.base import Session

CONTENTS = Contents(
    "artifacts", "best", "data", "diagnoses", "evaluations", "logs", "source", "source_export",
    "students", "timings", LEDGER, "results.csv", "results.json", "report.html",
    # A search that ended before its ledger began leaves logs behind.
    state=LEDGER, marks=(LEDGER, "logs/convert.log"),
)  # fmt: skip
# Names of flags that differ from those of fields.
FLAGS = {
    "import_modules": "import_module",
    "timeout_s": "step_timeout_s",
    "memory_bytes": "memory_limit_bytes",
}


@dataclasses.dataclass(frozen=True, repr=False)
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

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        report = self.output_dir / "report.html"
        if report.is_relative_to(Path.cwd()):
            report = report.relative_to(Path.cwd())
        link = html.escape(str(report))
        return f"{self.comparison._repr_html_()}\n<p>The report is <code>{link}</code>.</p>"

    def __repr__(self) -> str:
        return f"<Result in {self.output_dir}: {self.summary}>"

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
    chosen = check_arguments(
        budget, output_dir, resume=resume, overwrite=overwrite, quiet=quiet, **options
    )
    if isinstance(model, (str, Path)):
        model = sources.check_path(model)
    folder = CONTENTS.claim(Path(output_dir), resume, overwrite)
    is_tensorflow = not (isinstance(model, Path) and model.suffix in (".tflite", ".onnx"))
    budget = budget or Budget()
    command = _command(model, data, folder, budget, chosen)
    search = Search(folder, chosen, Progress(quiet), is_tensorflow, command)
    return Result(folder, *search.run(model, data, budget))


def check_arguments(
    budget: Budget | None,
    output_dir: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    **options: Any,
) -> Options:
    """Checks what can be checked before there is a model, and changes nothing.

    Args:
      budget, output_dir, resume, overwrite, quiet, **options: as `optimize` takes them.

    Raises:
      InputError: for an unknown or wrong option, another kind of budget, or an output folder that
        is in use.
    """
    if budget is not None and not isinstance(budget, Budget):
        raise InputError(
            f"The budget is a {type(budget).__name__}; expected tfopt.Budget(…), or None for the "
            "default."
        )
    unknown = sorted(set(options) - {field.name for field in dataclasses.fields(Options)})
    if unknown:
        valid = ", ".join(field.name for field in dataclasses.fields(Options))
        raise InputError(f"Unknown option {', '.join(unknown)}; the options are: {valid}.")
    for name in ("variants", "import_modules", "distill"):
        if options.get(name) is not None:
            options[name] = tuple(options[name])
    CONTENTS.check(Path(output_dir), resume, overwrite)
    return Options(**options)


def _command(model: Any, data: Any, folder: Path, budget: Budget, options: Options) -> str | None:
    """What does the same from a shell; None for objects that only Python has."""
    is_local = options.metric is not None and f"{main_module.NAME}:" in options.metric
    if not isinstance(model, Path) or not isinstance(data, (str, Path)) or is_local:
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
