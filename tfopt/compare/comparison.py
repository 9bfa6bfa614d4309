"""A table of variants, one row each, with everything behind it."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfopt.compare import files, notebook, origin, report
from tfopt.compare.regressions import find_regressions
from tfopt.compare.text import (
    MEASURED,
    NUM_FIGURES,
    align,
    figure,
    interval,
    plain,
    quality_of,
    reasons,
    size,
    to_markdown,
)
from tfopt.errors import InputError
from tfopt.measure.latency import Timing

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

COLUMNS = (
    "model", "variant", "parent", "batch_size", "num_threads", "status", "chosen", "median_ms",
    "p90_ms", "p99_ms", "device_ms", "speedup", "speedup_low", "speedup_high", "verdict",
    "cold_start_ms", "throughput_per_s", "size_bytes", "compressed_bytes", "peak_memory_bytes",
    "gpu_memory_bytes", "accuracy", "accuracy_drop", "accuracy_drop_high", "agreement",
    "max_abs_error", "reason",
)  # fmt: skip
LOAD_COLUMNS = (
    "variant", "artifact", "concurrency", "arrival_rate_per_s", "batch_size", "throughput_per_s",
    "median_ms", "p90_ms", "p99_ms", "num_unanswered",
)  # fmt: skip
ORIGIN = ("file", "machine", "baseline")


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """Rows of measured variants.

    Attributes:
      rows: dictionaries with keys out of `COLUMNS`; a figure that was not measured is missing or
        None, never 0. Rows that came from several files also have those of `ORIGIN`.
      details: source, data, budget, environment, baseline and choice.
      folder: where the raw times lie beside the results, if they do.
    """

    rows: tuple[dict[str, Any], ...]
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    folder: Path | None = dataclasses.field(default=None, compare=False)

    @classmethod
    def from_files(cls, paths: Sequence[str | Path], mixed: Collection[str] = ()) -> Comparison:
        """Reads one or more `results.json` (or folders that hold one) into one table.

        Args:
          paths: of the files or folders. With more than one, each row tells its `file`, its
            `machine` and its `baseline`.
          mixed: what may differ between them: `machines`, `batch_sizes`, `baselines`. Times of
            different machines or batch sizes, and speed-ups over different baselines, mean
            different things.

        Raises:
          InputError: when a file is missing or damaged (names the file and the field), or when
            machines, batch sizes or baselines differ and may not.
        """
        if not paths:
            raise InputError("No results to compare; give at least one results.json.")
        found = [_read(Path(path)) for path in paths]
        origin.check_mixed([(item.rows, item.details) for item in found], mixed)
        if len(found) == 1:
            return found[0]
        rows: list[dict[str, Any]] = []
        for item, path in zip(found, paths, strict=True):
            values = (str(path), item.machine, origin.baseline_of(item.details))
            about = dict(zip(ORIGIN, values, strict=True))
            # Rows of merged results name their origin already; it is no longer known with one
            # file what they were timed with.
            rows += [{**about, **row, "timing": None} for row in item.rows]
        return cls(tuple(rows), {"files": [str(path) for path in paths]})

    @property
    def machine(self) -> str:
        """Processor and number of cores that the results come from."""
        return origin.machine_of(self.details)

    @property
    def table(self) -> pd.DataFrame:
        """One row a variant, with the columns of `results.csv`; missing figures are NaN.

        Results of several files also have the columns `file`, `machine` and `baseline`.
        """
        return self._table.copy()

    @functools.cached_property
    def _table(self) -> pd.DataFrame:
        import pandas as pd

        names = [*COLUMNS, *(ORIGIN if any(ORIGIN[0] in row for row in self.rows) else ())]
        return pd.DataFrame({name: [row.get(name) for row in self.rows] for name in names})

    def wide(self, column: str = "speedup") -> pd.DataFrame:
        """One row a variant, one column for each model, batch size, machine and the like.

        Args:
          column: the figure that fills it.

        Raises:
          InputError: when there is no such column, or when a variant has several values for the
            same model, batch size, threads, machine and file.
        """
        _check_columns([column])
        table = self.table
        varying = [
            name
            for name in ("model", "batch_size", "num_threads", "machine", "baseline")
            if name in table and table[name].nunique(dropna=False) > 1
        ]
        keys = varying or ["model"]
        if "file" in table and table.duplicated([*keys, "variant"]).any():
            keys = [*varying, "file"]
        twice = table[table.duplicated([*keys, "variant"])]
        if len(twice):
            raise InputError(
                f"{twice.variant.iloc[0]} has several rows with the same {', '.join(keys)}, so "
                "that one cell cannot hold its figure; use the long table."
            )
        wide = table.pivot(index="variant", columns=keys, values=column)
        return wide.reindex(table.variant.drop_duplicates())

    def pareto(
        self, more: Sequence[str] = ("speedup", "accuracy"), less: Sequence[str] = ()
    ) -> pd.DataFrame:
        """The measured rows that no other row beats in one figure without losing in another.

        Args:
          more: columns of which more is better. Without an `accuracy` in any row, `agreement`
            takes its place.
          less: columns of which less is better, such as `size_bytes`.

        Returns:
          Rows of `table` in the order of the first figure, the best first. Rows that lack one of
          the figures are left out. Figures are compared as they are, without their intervals.

        Raises:
          InputError: when there is no such column.
        """
        _check_columns([*more, *less])
        table = self.table[self.table.status.isin(MEASURED)]
        quality = quality_of(self.rows)
        more = [quality if name == "accuracy" else name for name in more]
        names = list(dict.fromkeys([*more, *less]))
        table = table.dropna(subset=names)
        costs = table[names].to_numpy(float) * [-1 if name in more else 1 for name in names]
        is_best = [
            not ((costs <= row).all(axis=1) & (costs < row).any(axis=1)).any() for row in costs
        ]
        return table[is_best].sort_values(names[0], ascending=names[0] not in more)

    def relative_to(self, variant: str) -> pd.DataFrame:
        """The table with a column `ratio`: the median of `variant` over each row's.

        Each row is divided into the row of the same model, batch size and file. The medians of
        one search come from runs at different times: `speedup` is the figure with an interval.
        This is for looking at it from another side.

        Raises:
          InputError: when no model has that variant with a median.
        """
        table = self.table
        reference = table[(table.variant == variant) & table.median_ms.notna()]
        if reference.empty:
            names = ", ".join(table.variant[table.median_ms.notna()].unique())
            raise InputError(f"No measured variant {variant!r}; there are: {names}.")
        keys = [name for name in ("model", "batch_size", "file") if name in table]
        by_key = reference.groupby(keys).median_ms.median().rename("reference")
        table["ratio"] = table.join(by_key, on=keys).reference / table.median_ms
        return table

    def regressions(
        self,
        against: Comparison,
        slower: float = 0.05,
        absolute: bool = False,
        mixed: Collection[str] = (),
    ) -> pd.DataFrame:
        """What became slower since other results; see `tfopt.compare.regressions`.

        Args:
          against: the results from before.
          slower: the share that is tolerated; 0.05 allows one twentieth of the speed to be lost.
          absolute: compare median times instead of speed-ups; both must come from one machine.
          mixed: what may differ, as in `from_files`.

        Returns:
          One row for each variant of both: `model, variant, batch_size, before, after, ratio,
          ratio_low, ratio_high, verdict, reason`. `ratio` is the new speed over the old one, with
          its one-sided 95 % bounds; `verdict` is `regression`, `maybe`, `ok` or `not_comparable`.

        Raises:
          InputError: when the two cannot be compared.
        """
        return find_regressions(self, against, slower, absolute, mixed)

    @property
    def loads(self) -> pd.DataFrame:
        """What `tfopt.benchmark` found under load, one row an artifact and load.

        Columns: `variant, artifact, concurrency, arrival_rate_per_s` (missing for a closed loop),
        `batch_size, throughput_per_s, median_ms, p90_ms, p99_ms, num_unanswered`. Latencies are
        from when a request was due; percentiles are missing when requests were too few for them
        or some were never answered.
        """
        import pandas as pd

        return pd.DataFrame(
            [
                {name: load.get(name) for name in LOAD_COLUMNS}
                for load in self.details.get("loads", ())
            ],
            columns=list(LOAD_COLUMNS),
        )

    @property
    def summary(self) -> str:
        """What was chosen and why."""
        return self.details.get("summary", "")

    def timings(self) -> dict[str, Timing]:
        """The raw times of the run in which each row's figures were taken, by variant.

        Raises:
          InputError: when they are not there: they lie in `timings/` beside `results.json`, and
            results of several files have none.
        """
        found: dict[str, Timing] = {}
        opened: dict[str, Mapping[str, Any]] = {"": self.details.get("timings", {})}
        for row in self.rows:
            place = row.get("timing")
            if place is None:
                continue
            name, key = place["file"] or "", place["key"]
            try:
                if name not in opened:
                    assert self.folder is not None
                    opened[name] = json.loads((self.folder / name).read_text())["timings"]
                found[row["variant"]] = Timing.from_json(opened[name][key])
            except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
                raise InputError(
                    f"The raw times of {row['variant']} are missing or damaged; expected them in "
                    f"{name or 'the results'} beside {files.FILE_NAME}."
                ) from error
        if not found:
            raise InputError("These results hold no raw times; open those of one run.")
        return found

    # Files.

    def save(self, folder: str | Path) -> None:
        """Writes `results.csv`, `results.json` and `report.html`; each appears as a whole."""
        folder = Path(folder)
        self.to_csv(folder / "results.csv")
        self.save_json(folder / files.FILE_NAME)
        with files.replacing(folder / "report.html") as file:
            file.write(report.to_html(self))

    def save_json(self, path: str | Path) -> None:
        """Writes the one file that `from_files` reads."""
        files.write_json(Path(path), self.rows, self.details)

    def to_csv(self, path: str | Path) -> None:
        """Writes the table; cells of figures that were not measured are empty."""
        names = list(self.table.columns)
        cells = [[_cell(row.get(name)) for name in names] for row in self.rows]
        with files.replacing(Path(path)) as file:
            csv.writer(file, lineterminator="\n").writerows([names, *cells])

    def to_tensorboard(self, folder: str | Path) -> list[Path]:
        """Writes runs for TensorBoard; see `tfopt.compare.tensorboard.write`."""
        from tfopt.compare import tensorboard

        return tensorboard.write(self, folder)

    # Text.

    def to_text(self) -> str:
        """A table for a terminal: the columns that a choice is made by."""
        cells = self.short_table()
        table = align(cells, num_left=len(cells[0]) - NUM_FIGURES)
        table.insert(1, "-" * max(map(len, table)))
        lines = [f"  {', '.join(names)}: {reason}" for reason, names in reasons(self.rows).items()]
        return "\n".join([*table, *(["", "Not chosen because:", *lines] if lines else [])])

    def to_markdown(self) -> str:
        """The table of `to_text` for GitHub and the like."""
        head, *lines = self.short_table()
        return to_markdown([name.strip() for name in head], lines, len(head) - NUM_FIGURES)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return notebook.to_html(self)

    def __repr__(self) -> str:
        chosen = self.details.get("chosen")
        return f"<Comparison of {len(self.rows)} variants{f', {chosen} chosen' if chosen else ''}>"

    def short_table(self) -> list[list[str]]:
        """Head and lines of the columns that a choice is made by, as text.

        Columns that are the same in every row are left out; the last are numbers.
        """
        extra = [
            name
            for name in ("model", "batch_size", "machine", "file")
            if len({row.get(name) for row in self.rows}) > 1
        ]
        lines = [[*(name.replace("_", " ") for name in extra), "variant", "status", "median ms",
                  "speed-up", "accuracy", "drop ≤", "size"]]  # fmt: skip
        lines[0][0] = "  " + lines[0][0] if extra else lines[0][0]
        for row in self.rows:
            line = [
                *(str(row.get(name, "")) for name in extra),
                row["variant"],
                row["status"],
                figure(row.get("median_ms"), ".3f"),
                interval(row),
                figure(row.get("accuracy"), ".4f"),
                figure(row.get("accuracy_drop_high"), ".4f"),
                size(row.get("size_bytes")),
            ]
            line[0] = ("* " if row.get("chosen") else "  ") + line[0]
            lines.append(line)
        return lines

    # Plots.

    def plot_pareto(self, ax: Axes | None = None) -> Axes:
        """Speed-up against accuracy, with intervals; see `tfopt.compare.plots.pareto`."""
        from tfopt.compare import plots

        return plots.pareto(self, ax)

    def plot_latency(self, variants: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
        """How the times of each variant are spread; see `tfopt.compare.plots.latency`."""
        from tfopt.compare import plots

        return plots.latency(self, variants, ax)

    def plot_tradeoff(
        self, x: str = "size_bytes", y: str = "speedup", ax: Axes | None = None
    ) -> Axes:
        """Any figure against another; see `tfopt.compare.plots.tradeoff`."""
        from tfopt.compare import plots

        return plots.tradeoff(self, x, y, ax)


def _read(path: Path) -> Comparison:
    file = path / files.FILE_NAME if path.is_dir() else path
    comparison = Comparison(*files.read(file), file.parent)
    files.check(file, comparison.rows, comparison._table)
    return comparison


def _check_columns(names: Collection[str]) -> None:
    """Checks that names are columns with numbers."""
    texts = {"model", "variant", "parent", "status", "chosen", "verdict", "reason"}
    numbers = [name for name in COLUMNS if name not in texts]
    unknown = [name for name in names if name not in numbers]
    if unknown:
        raise InputError(
            f"{', '.join(unknown)} is no column with figures; those are: {', '.join(numbers)}."
        )


def _cell(value: Any) -> Any:
    value = plain(value)
    return "" if value is None else value
