"""The variant that tfopt chooses against what scripts written by hand reach.

Target: the chosen variant is at least 0.97 times as fast as the fastest version that the scripts in
`handwritten/` make with the best documented settings of TensorFlow, LiteRT, ONNX Runtime and
OpenVINO.

What is done:
 1. The model is exported as a SavedModel and optimized by `tfopt.optimize` with its own defaults
    (unless --optimized_dir holds a finished search), and converted by each script in a process of
    its own. All of it stays in --work_dir, and a second run takes it from there.
 2. Each version is loaded in a process of its own and stays there, idle while another is timed:
    pools of threads of several runtimes in one process slow each other down. Inputs are the same
    real examples, batch size 1.
 3. Screening: a few blocks of calls of each version. By-hand versions outside the accuracy budget
    drop out by tfopt's own rule (paired, 95 % upper bound) where there are labels and the first
    output holds one value for each class; with a budget of 1 or more, nothing drops out.
 4. Final: blocks of tfopt's choice and of the three fastest by-hand versions, in random order
    inside each round. They are started anew a few times: where its memory happens to lie makes a
    process some percent faster or slower for its whole life. The ratio is how many times as fast
    tfopt's is, paired round by round (`tfopt.measure.statistics.paired_ratio`); the target is
    judged against the by-hand version with the best median in the final.
Raw times of the final and the steal of each block (the share of the processor time wanted by
this machine that the hypervisor withheld) are in the results.

With a network that needs no files (the budget is 1, since its weights are random):

    python scripts/benchmarks/against_handwritten.py --model=mobilenet_v2 \
        --work_dir=/tmp/against_mobilenet_v2 --output=against_mobilenet_v2.json

With a model and data of your own, .keras or SavedModel:

    python scripts/benchmarks/against_handwritten.py --model=model.keras --data=data.npz \
        --work_dir=/tmp/against_model --output=against_model.json
"""

import dataclasses
import importlib
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import example_models
import machine
import numpy as np
import reporting
import runner_processes
from absl import flags
from runner_processes import Arrays, RunnerError, RunnerProcess

import tfopt
from tfopt.measure import statistics

_MODEL = flags.DEFINE_string(
    "model", None, "SavedModel folder, .keras file, mobilenet_v2 or resnet50.", required=True
)
_DATA = flags.DEFINE_string("data", None, "npz as `tfopt optimize` takes it.")
_WORK_DIR = flags.DEFINE_string(
    "work_dir", None, "Folder of this model and data; keeps what was converted.", required=True
)
_OPTIMIZED_DIR = flags.DEFINE_string(
    "optimized_dir", None, "Finished output folder of a search on the same model."
)
_MAX_ACCURACY_DROP = flags.DEFINE_float(
    "max_accuracy_drop", None, "Budget of both sides; default: 0.01, 1 for a network by name."
)
_NUM_THREADS = flags.DEFINE_integer(
    "num_threads", None, "Threads of every runtime; default: all cores.", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 10, "Blocks of each finalist after a start.", lower_bound=2
)
_STARTS = flags.DEFINE_integer("starts", 5, "Starts of each finalist.", lower_bound=1)
_SCREENING_ROUNDS = flags.DEFINE_integer(
    "screening_rounds", 4, "Blocks of each version before the final.", lower_bound=1
)
_BLOCK_S = flags.DEFINE_float("block_s", 0.25, "Timed seconds of a block, about.", lower_bound=0)
_SETTLE_S = flags.DEFINE_float(
    "settle_s", 0.05, "Seconds of uncounted calls before a block.", lower_bound=0
)
_OUTPUT = reporting.define_output()

_TARGET = 0.97
_RUNTIMES = ("tensorflow", "litert", "onnxruntime", "openvino")
_TFOPT = "tfopt's choice"
_REFERENCE = "tensorflow as_saved"
_NUM_FINALISTS = 3
_NUM_CALIBRATION = 200
_NUM_TIMED = 20
_MIN_BLOCK_CALLS = 5
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Examples:
    """Single examples from an npz.

    Attributes:
      calibration: for the scripts' quantizers.
      evaluation: for accuracy; the first of them for timing.
      labels: of the evaluation examples, or None.
    """

    calibration: list[Arrays]
    evaluation: list[Arrays]
    labels: np.ndarray | None

    @classmethod
    def read(cls, path: str, signature: Any) -> "Examples":
        """Reads `…_train` and `…_test`, or takes a quarter of all examples for calibration."""
        with np.load(path) as data:
            names = {
                spec.name: spec.name
                if spec.name in data or f"{spec.name}_test" in data or len(signature.inputs) > 1
                else "x"
                for spec in signature.inputs
            }
            has_parts = all(f"{name}_test" in data for name in names.values())
            suffixes = ("_train", "_test") if has_parts else ("", "")
            train, test = (
                {
                    spec.name: data[f"{names[spec.name]}{suffix}"].astype(spec.dtype)
                    for spec in signature.inputs
                }
                for suffix in suffixes
            )
            label_name = f"y{suffixes[1]}"
            labels = data.get(label_name)
        num_examples = len(next(iter(test.values())))
        first = 0 if has_parts else num_examples // 4
        num_calibration = min(
            _NUM_CALIBRATION, len(next(iter(train.values()))) if has_parts else first
        )
        return cls(
            _single(train, range(num_calibration)),
            _single(test, range(first, num_examples)),
            None if labels is None else labels[first:],
        )


def _single(arrays: Arrays, indices: Sequence[int]) -> list[Arrays]:
    return [{name: value[i : i + 1] for name, value in arrays.items()} for i in indices]


def _optimize(model: pathlib.Path, data: str, max_drop: float, folder: pathlib.Path) -> None:
    if (folder / "best").exists():
        print(f"Using the finished search in {folder}.")
        return
    is_begun = (folder / "ledger.jsonl").exists()
    result = tfopt.optimize(
        model,
        data,
        tfopt.Budget(max_accuracy_drop=max_drop),
        folder,
        resume=is_begun,
        num_threads=_NUM_THREADS.value,
    )
    print(result.summary)


def _convert_by_hand(
    runtime: str, model: pathlib.Path, calibration: list[Arrays], folder: pathlib.Path
) -> list[str]:
    """Runs a script's `convert`; in a child process."""
    runner_processes.redirect_output(folder.with_suffix(".log"))
    module = importlib.import_module(f"handwritten.with_{runtime}")
    return module.convert(model, calibration, folder)


def _by_hand(
    model: pathlib.Path, calibration: list[Arrays], folder: pathlib.Path
) -> dict[str, tuple[str, pathlib.Path, str]]:
    """Returns arguments of `open_by_hand`, without the threads, by the version's name."""
    versions = {}
    for runtime in _RUNTIMES:
        artifacts, record = folder / runtime, folder / f"{runtime}.json"
        if not record.exists():
            print(f"Converting by hand with {runtime} …", flush=True)
            shutil.rmtree(artifacts, ignore_errors=True)
            names = example_models.in_child(
                _convert_by_hand, runtime, model, calibration, artifacts
            )
            record.write_text(json.dumps(names))
        for name in json.loads(record.read_text()):
            versions[f"{runtime} {name}"] = (runtime, artifacts, name)
    return versions


class _Timer:
    """Takes blocks of the versions in random order."""

    def __init__(self, processes: dict[str, RunnerProcess]) -> None:
        self._processes = processes
        self._random = np.random.default_rng(_SEED)
        self._call_s = {}

    def warm_up(self, names: Sequence[str]) -> dict[str, str]:
        """Warms versions up one by one; returns reasons of those that do not run."""
        failures = {}
        for name in names:
            try:
                self._call_s[name] = self._processes[name].warm_up(4 * _BLOCK_S.value)
            except RunnerError as error:
                failures[name] = str(error)
        return failures

    def rounds(
        self, names: Sequence[str], count: int
    ) -> tuple[dict[str, list[list[float]]], dict[str, list[float | None]]]:
        """Returns blocks of seconds, and the steal during each block."""
        blocks: dict[str, list[list[float]]] = {name: [] for name in names}
        steal: dict[str, list[float | None]] = {name: [] for name in names}
        for _ in range(count):
            for name in self.shuffled(names):
                num_calls = max(_MIN_BLOCK_CALLS, round(_BLOCK_S.value / self._call_s[name]))
                meter = machine.StealMeter()
                blocks[name].append(self._processes[name].time_block(_SETTLE_S.value, num_calls))
                steal[name].append(meter.share())
        return blocks, steal

    def shuffled(self, names: Sequence[str]) -> list[str]:
        """Returns the names in a random order."""
        return self._random.permutation(list(names)).tolist()


def _close(processes: dict[str, RunnerProcess]) -> None:
    """Ends processes and forgets them."""
    while processes:
        processes.popitem()[1].close()


def _median_ms(blocks: list[list[float]]) -> float:
    return float(np.median(np.concatenate(blocks))) * 1e3


def _inside_budget(
    processes: dict[str, RunnerProcess],
    examples: Examples,
    fastest_first: Sequence[str],
    max_drop: float,
) -> tuple[list[str], dict[str, str]]:
    """Returns the finalists and why faster ones are none, by tfopt's rule for top-1."""
    if max_drop >= 1 or examples.labels is None:
        return list(fastest_first[:_NUM_FINALISTS]), {}
    reference = processes[_REFERENCE].first_outputs(examples.evaluation)
    labels = np.asarray(examples.labels)
    if labels.ndim == 2 and labels.shape == reference.shape:
        labels = labels.argmax(-1)
    labels = labels.reshape(-1)
    if reference.ndim != 2 or reference.shape[1] < 2 or len(labels) != len(reference):
        raise ValueError(
            f"Outputs of shape {reference.shape} and labels of shape {examples.labels.shape} are "
            "no classification, so that the budget of by-hand versions cannot be checked; give "
            "--max_accuracy_drop=1."
        )
    finalists, reasons = [], {}
    for name in fastest_first:
        if len(finalists) == _NUM_FINALISTS:
            break
        outputs = processes[name].first_outputs(examples.evaluation)
        drop = statistics.paired_proportion_bound(
            reference.argmax(-1) == labels, outputs.argmax(-1) == labels
        )
        if name == _REFERENCE or drop.high <= max_drop:
            finalists.append(name)
        else:
            reasons[name] = f"over budget: drop up to {drop.high:.4f}"
    return finalists, reasons


def main(_: list[str]) -> None:
    """Converts, times and prints."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    by_name = _MODEL.value in example_models.NAMES
    max_drop = _MAX_ACCURACY_DROP.value
    if max_drop is None:
        max_drop = 1.0 if by_name else 0.01
    num_threads = _NUM_THREADS.value or len(os.sched_getaffinity(0))
    work = pathlib.Path(_WORK_DIR.value).absolute()
    by_hand_folder = work / "handwritten"
    by_hand_folder.mkdir(parents=True, exist_ok=True)
    _check_same_inputs(work / "inputs.json")
    model, data = example_models.prepare(_MODEL.value, _DATA.value, work)
    optimized = pathlib.Path(_OPTIMIZED_DIR.value or work / "optimized").absolute()
    _optimize(model, data, max_drop, optimized)
    best = tfopt.Artifact.open(optimized / "best")
    examples = Examples.read(data, best.signature)
    versions = _by_hand(model, examples.calibration, by_hand_folder)

    timed = examples.evaluation[:_NUM_TIMED]
    logs = work / "logs"
    logs.mkdir(exist_ok=True)
    openers: dict[str, tuple[Any, ...]] = {_TFOPT: (runner_processes.open_by_tfopt, best.folder)}
    openers |= {name: (runner_processes.open_by_hand, *args) for name, args in versions.items()}

    def start(name: str) -> RunnerProcess:
        log = logs / f"{name}.log".replace(" ", "_")
        return RunnerProcess(log, timed, *openers[name], num_threads)

    processes: dict[str, RunnerProcess] = {}
    reasons: dict[str, str] = {}
    try:
        for name in openers:
            try:
                processes[name] = start(name)
            except RunnerError as error:
                reasons[name] = str(error)
        timer = _Timer(processes)
        print(f"Screening {len(processes)} versions …", flush=True)
        reasons |= timer.warm_up(list(processes))
        if _TFOPT in reasons:
            raise RunnerError(f"tfopt's choice does not run: {reasons[_TFOPT]}")
        running = [name for name in processes if name not in reasons]
        outputs = {name: processes[name].first_outputs(timed) for name in running}
        screening, _ = timer.rounds(running, _SCREENING_ROUNDS.value)
        screening_ms = {name: _median_ms(blocks) for name, blocks in screening.items()}
        fastest_first = sorted((n for n in running if n != _TFOPT), key=screening_ms.__getitem__)
        by_hand, over_budget = _inside_budget(processes, examples, fastest_first, max_drop)
        reasons |= over_budget
        finalists = [_TFOPT, *by_hand]
        print(f"Final: {', '.join(finalists)} …", flush=True)
        blocks: dict[str, list[list[float]]] = {name: [] for name in finalists}
        steal: dict[str, list[float | None]] = {name: [] for name in finalists}
        for _ in range(_STARTS.value):
            _close(processes)
            for name in timer.shuffled(finalists):
                processes[name] = start(name)
            timer.warm_up(finalists)
            for into, found in zip(
                (blocks, steal), timer.rounds(finalists, _ROUNDS.value), strict=True
            ):
                for name in finalists:
                    into[name] += found[name]
    finally:
        _close(processes)

    medians_ms = {name: _median_ms(blocks[name]) for name in finalists}
    ratios = {name: statistics.paired_ratio(blocks[name], blocks[_TFOPT]) for name in by_hand}
    best_by_hand = min(by_hand, key=medians_ms.__getitem__)
    ratio = ratios[best_by_hand]
    is_met = ratio.estimate >= _TARGET
    shares = [share for values in steal.values() for share in values if share is not None]
    mean_steal = float(np.mean(shares)) if shares else None

    rows = [
        ("version", "screening ms", "final ms", "its median / tfopt's", "steal", "differs by", "")
    ]
    for name in [_TFOPT, *fastest_first, *(name for name in versions if name not in screening_ms)]:
        is_final = name in finalists
        final_steal = [share for share in steal.get(name, ()) if share is not None]
        difference = None
        if name in outputs and _REFERENCE in outputs:
            difference = float(np.abs(outputs[name] - outputs[_REFERENCE]).max())
        rows.append(
            (
                f"{name} ({best.variant})" if name == _TFOPT else name,
                f"{screening_ms[name]:.3f}" if name in screening_ms else None,
                f"{medians_ms[name]:.3f}" if is_final else None,
                _interval(ratios[name]) if name in ratios else None,
                f"{np.mean(final_steal):.0%}" if final_steal else None,
                None if difference is None else f"{difference:.2g}",
                reasons.get(name),
            )
        )
    print(f"\n{reporting.format_table(rows)}")
    print(
        f"\n{best.variant} by tfopt is {_interval(ratio)} times as fast as {best_by_hand} by hand; "
        f"target {_TARGET}: {reporting.met(is_met)}. {num_threads} threads, mean steal "
        f"{'unknown' if mean_steal is None else format(mean_steal, '.1%')}."
    )
    reporting.save(
        _OUTPUT.value,
        {
            "benchmark": "against_handwritten",
            "model": _MODEL.value,
            "num_threads": num_threads,
            "max_accuracy_drop": max_drop,
            "chosen": str(best.variant),
            "best_by_hand": best_by_hand,
            "ratio": ratio.estimate,
            "ratio_low": ratio.low,
            "ratio_high": ratio.high,
            "target": _TARGET,
            "is_met": is_met,
            "mean_steal": mean_steal,
            "screening_ms": screening_ms,
            "final_ms": medians_ms,
            "ratios": {name: dataclasses.asdict(value) for name, value in ratios.items()},
            "not_in_final": reasons,
            "steal": steal,
            "blocks_s": blocks,
        },
    )


def _check_same_inputs(record: pathlib.Path) -> None:
    """Checks that a work folder is used for one model and one data file."""
    inputs = {"model": _MODEL.value, "data": _DATA.value}
    for key, path in tuple(inputs.items()):
        if path is not None and pathlib.Path(path).exists():
            inputs[key] = str(pathlib.Path(path).absolute())
            inputs[f"{key}_changed"] = pathlib.Path(path).stat().st_mtime
    if record.exists() and json.loads(record.read_text()) != inputs:
        raise ValueError(
            f"--work_dir holds conversions of {json.loads(record.read_text())} and this run is of "
            f"{inputs}; name another folder."
        )
    record.write_text(json.dumps(inputs))


def _interval(ratio: statistics.Interval) -> str:
    return f"{ratio.estimate:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


if __name__ == "__main__":
    reporting.run_app(main)
