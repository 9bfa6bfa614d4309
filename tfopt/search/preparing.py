"""What comes before the first variant: model, data, plan, and whether it is the same search."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any

from tfopt import dataset as datasets
from tfopt import live, source_check
from tfopt.dataset import Dataset
from tfopt.dataset.streams import is_bounded, open_text
from tfopt.errors import ConversionError, InputError
from tfopt.first_examples import first_examples
from tfopt.isolation import Worker
from tfopt.measure import choosing, environment, metric_names
from tfopt.progress import Progress
from tfopt.search.budget import Budget
from tfopt.search.candidates import plan
from tfopt.search.ledger import Ledger
from tfopt.search.options import Options
from tfopt.search.run import Run
from tfopt.source import Source


def prepare(
    folder: Path,
    model: Any,
    data: Any,
    budget: Budget,
    options: Options,
    converter: Worker,
    progress: Progress,
    command: str | None,
) -> Run:
    """Writes source, data and ledger into the output folder.

    Args:
      folder: the output folder; what lies there of an earlier search goes on.
      model: as `tfopt.optimize` takes it.
      data: likewise.
      budget: the limits.
      options: of the search.
      converter: loads and freezes the model.
      progress: gets notes.
      command: what does the same from a shell.

    Raises:
      InputError: when model and data do not go together, or with what the folder holds.
    """
    shutil.rmtree(folder / "best", ignore_errors=True)
    if isinstance(data, (str, Path)):
        data = open_text(str(data))
    is_bounded(data)  # before the model, which takes long
    progress.say("Reading the model …")
    example = first_examples(data) if source_check.is_keras(model) else None
    source = _prepare_source(folder, model, options, converter, example)
    fixed = source.signature.batch_size
    if fixed not in (None, options.batch_size):
        raise InputError(
            f"The model takes batches of {fixed} only and `batch_size` is "
            f"{options.batch_size}; set it to {fixed}."
        )
    progress.say("Reading the data …")
    shutil.rmtree(folder / "data", ignore_errors=True)
    dataset = datasets.write(
        data,
        source.signature,
        folder / "data",
        seed=options.seed,
        num_calibration=options.num_calibration,
        progress=progress.counter("examples"),
    )
    try:
        found = source_check.check_model(
            converter, model, source, dataset,
            example=example,
            custom_objects=options.custom_objects,
            trust_model=options.trust_model,
        )  # fmt: skip
    except ConversionError as error:
        raise InputError(f"The model cannot be run on this data: {error}") from error
    source = dataclasses.replace(source, notes=(*source.notes, *found))
    for note in (*source.notes, *dataset.notes):
        progress.say(f"Note: {note}")
    scored = choosing.scored_outputs(
        options.metric, options.output_name, source.signature.output_names, _labelled(dataset)
    )
    for name in scored.values():
        if name is not None:
            converter.call("tfopt.measure.metric_names:check", name)
    planned = plan(source.kind, options.variants, source.not_frozen)
    for variant, reason in planned.unsuited.items():
        progress.say(f"Note: {variant} is tried because it was asked for. {reason}")
    num_threads = options.num_threads or environment.num_cores()
    identity = {
        "source": source.sha256,
        "data": dataset.sha256,
        **{k: v for k, v in dataclasses.asdict(options).items() if k != "limits"},
        "metric_code": metric_names.fingerprint(options.metric),
        "num_threads": num_threads,
        **dataclasses.asdict(budget),
        "cpu": environment.cpu_model(),
        "versions": environment.versions(),
    }
    return Run(
        folder=folder,
        source=source,
        dataset=dataset,
        plan=planned,
        ledger=Ledger(folder, identity),
        budget=budget,
        scored=scored,
        output_name=options.output_name,
        batch_size=options.batch_size,
        num_threads=num_threads,
        seed=options.seed,
        command=command,
    )


def _prepare_source(
    folder: Path, model: Any, options: Options, converter: Worker, example: Any
) -> Source:
    """Loads and freezes the model in a worker; a live one is exported here first."""
    source_folder = folder / "source"
    shutil.rmtree(source_folder, ignore_errors=True)
    freeze = functools.partial(
        converter.call,
        "tfopt.source:prepare",
        signature=options.signature,
        custom_objects=options.custom_objects,
        import_modules=options.import_modules,
        trust_model=options.trust_model,
        example=example,
    )
    try:
        if isinstance(model, Path):
            return freeze(model, source_folder)
        exported = folder / "source_export"
        shutil.rmtree(exported, ignore_errors=True)
        live.export(model, exported, example)
        source = freeze(
            exported,
            source_folder,
            name=getattr(model, "name", None) or "model",
            sha256=live.hash_live(model),
        )
        exported.rename(source_folder / "saved_model")
        return dataclasses.replace(source, path=source_folder / "saved_model")
    except ConversionError as error:
        raise InputError(f"The model cannot be loaded: {error}") from error


def _labelled(dataset: Dataset) -> tuple[str, ...] | None:
    """The outputs that labels belong to; empty where they name none, None without labels."""
    return dataset.evaluation.label_names if dataset.has_labels else None
