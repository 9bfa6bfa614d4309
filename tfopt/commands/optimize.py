"""Find the fastest version of a model that stays inside a budget on this machine.

Writes best/ (the artifact to ship), results.csv, results.json and report.html to --output_dir.
Exit status 0 when a version is chosen (the unchanged model counts), 1 when nothing meets the
limits, 2 for wrong flags or input, 130 when interrupted; go on with --resume.
"""

from __future__ import annotations

from absl import flags

from tfopt.commands import _flags


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags."""
    _flags.define_model(values)
    _flags.define_data(values)
    _flags.define_measurement(values)
    _flags.define_limits(values)
    flags.DEFINE_string("output_dir", None, "New or empty folder.", flag_values=values)
    flags.DEFINE_float(
        "max_accuracy_drop",
        0.01,
        "Points of the metric; of errors a share of what the mean label would have.",
        flag_values=values,
    )
    flags.DEFINE_float("max_latency_ms", None, "Limit on the median.", flag_values=values)
    flags.DEFINE_integer("max_size_bytes", None, "Limit on the files.", flag_values=values)
    flags.DEFINE_integer(
        "max_memory_bytes", None, "Limit on the memory of a process that runs it.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_float(
        "min_sqnr_db",
        None,
        "Least signal to noise ratio of every output against the model as saved, in decibels; "
        "variants below it are wrong. Default: by precision, from 50 (float32) to 10 (int8).",
        flag_values=values,
    )
    flags.DEFINE_string(
        "variants",
        None,
        "Comma-separated variants and patterns: int8@litert, *@openvino, "
        "int8(calibration=entropy)@onnxruntime. Default: all that suit this machine.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "metric",
        None,
        "top1, top5, auc, position_accuracy, mean_iou, macro_f1, micro_f1, mse, mae, pinball, "
        "keras:NAME(option=value), sklearn:NAME(option=value) or package.module:function; "
        "output=metric,… for several outputs. Default: by the labels.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "output_name", None, "The only output that is looked at, if several.", flag_values=values
    )
    flags.DEFINE_string(
        "distill",
        None,
        "Comma-separated students to distil from the model and to try like it: "
        "teacher(width=0.5,depth=0.5), MobileNetV3Small, student.keras, package.module:function. "
        "Needs arrays …_train and …_test.",
        flag_values=values,
    )
    flags.DEFINE_integer("distill_epochs", 20, "Of their training.", flag_values=values)
    flags.DEFINE_float(
        "distill_alpha", 0.1, "Share of the labels' loss, 0 to 1.", flag_values=values
    )
    flags.DEFINE_float("distill_temperature", 4.0, "Of soft targets.", flag_values=values)
    flags.DEFINE_integer(
        "distill_batch_size", 64, "Examples in a training step.", flag_values=values
    )
    flags.DEFINE_bool("resume", False, "Go on with --output_dir.", flag_values=values)
    flags.DEFINE_bool(
        "overwrite", False, "Delete what an earlier search left there.", flag_values=values
    )
    flags.DEFINE_bool("quiet", False, "Print no progress.", flag_values=values)


def run(values: flags.FlagValues) -> int:
    """Runs the command."""
    _flags.require(values, "model", "data", "output_dir")
    from tfopt import variant
    from tfopt.search.budget import Budget
    from tfopt.search.optimize import optimize

    result = optimize(
        values.model,
        values.data,
        Budget(
            values.max_accuracy_drop,
            values.max_latency_ms,
            values.max_size_bytes,
            values.max_memory_bytes,
            values.min_sqnr_db,
        ),
        values.output_dir,
        resume=values.resume,
        overwrite=values.overwrite,
        quiet=values.quiet,
        variants=None if values.variants is None else variant.split(values.variants),
        metric=values.metric,
        output_name=values.output_name,
        batch_size=values.batch_size,
        num_threads=values.num_threads,
        seed=values.seed,
        max_timing_s=values.max_timing_s,
        interval_width=values.interval_width,
        num_calibration=values.num_calibration,
        limits=_flags.limits(values),
        distill=() if values.distill is None else variant.split(values.distill),
        distill_epochs=values.distill_epochs,
        distill_alpha=values.distill_alpha,
        distill_temperature=values.distill_temperature,
        distill_batch_size=values.distill_batch_size,
        **_flags.source_options(values),
    )
    print(_flags.as_flags(result.comparison.to_text(), values))
    print(f"\n{result.summary}")
    if result.best is None:
        return 1
    print(f"Ship {result.best.folder}; the report is {result.output_dir / 'report.html'}.")
    return 0
