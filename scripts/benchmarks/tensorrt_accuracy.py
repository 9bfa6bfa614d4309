"""What TensorRT's precisions cost in accuracy, by tfopt's own search.

Targets: float16 at most 0.1 points of top-1 below the model as saved, int8 at most 0.5 points.

    python scripts/benchmarks/tensorrt_accuracy.py --model=resnet20.keras --data=cifar10.npz \
        --work_dir=/tmp/accuracy --output=accuracy.json

It takes some minutes, most of it for building engines. --variants='*@tensorrt' tries the other
runtime; what is in --work_dir is not made again.
"""

import pathlib

import reporting
from absl import flags

import tfopt

_MODEL = flags.DEFINE_string("model", None, "As `tfopt optimize` takes it.", required=True)
_DATA = flags.DEFINE_string("data", None, "npz with labels.", required=True)
_VARIANTS = flags.DEFINE_list(
    "variants", ["float32@tf_trt", "float16@tf_trt", "int8@tf_trt"], "What is compared."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Examples in a batch.", lower_bound=1)
_WORK_DIR = flags.DEFINE_string("work_dir", None, "The search's folder.", required=True)
_OUTPUT = reporting.define_output()

_TARGETS = {"float16": 0.001, "int8": 0.005}


def main(_: list[str]) -> None:
    """Searches and prints."""
    work = pathlib.Path(_WORK_DIR.value)
    result = tfopt.optimize(
        _MODEL.value,
        _DATA.value,
        tfopt.Budget(max_accuracy_drop=1.0),
        output_dir=work,
        variants=tuple(_VARIANTS.value),
        batch_size=_BATCH_SIZE.value,
        resume=work.exists(),
    )
    table = [("variant", "accuracy", "drop", "drop at most", "times", "target")]
    is_met = True
    kept = []
    for row in result.comparison.rows:
        target, drop = _TARGETS.get(row["variant"].split("@")[0]), row.get("accuracy_drop")
        judged = row["reason"][:80] if row["status"] == "failed" else ""
        if target is not None:
            fits = drop is not None and drop <= target
            is_met = is_met and fits
            judged = judged or f"{target} {reporting.met(fits)}"
        names = ("accuracy", "accuracy_drop", "accuracy_drop_high", "speedup")
        figures = ["" if row.get(name) is None else f"{row[name]:.4f}" for name in names]
        table.append((row["variant"], *figures, judged))
        kept.append({name: row.get(name) for name in ("variant", "reason", *names)})
    print(reporting.format_table(table))
    reporting.save(
        _OUTPUT.value, {"benchmark": "tensorrt_accuracy", "is_met": is_met, "rows": kept}
    )


if __name__ == "__main__":
    reporting.run_app(main)
