"""Convert a SavedModel with TF-TRT; the same as `tfopt convert` with a variant of tf_trt.

For example: tfopt convert_trt --model=saved_model --precision=int8 --data=data.npz
--batch_size=64 --output_dir=engines
"""

from __future__ import annotations

from absl import flags

from tfopt.commands import _flags

STRATEGIES = ("Range+Optimal", "Range", "Optimal", "ImplicitBatchModeCompatible")
OPTIONS = (
    "shapes", "strategy", "min_segment_size", "workspace_mib", "max_cached_engines", "tf32"
)  # fmt: skip


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags."""
    _flags.define_model(values)
    _flags.define_data(values)
    _flags.define_limits(values)
    flags.DEFINE_string("output_dir", None, "New folder for the artifact.", flag_values=values)
    flags.DEFINE_enum(
        "precision",
        "float16",
        ["float32", "float16", "int8"],
        "Of the engines; int8 is calibrated on --data, unless the model was trained for it.",
        flag_values=values,
    )
    flags.DEFINE_integer("batch_size", 1, "That the engines are best at.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of the choice of examples.", flag_values=values)
    flags.DEFINE_enum(
        "shapes",
        "static",
        ["static", "dynamic"],
        "Engines for single shapes, or for a range of them.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "strategy",
        STRATEGIES[0],
        STRATEGIES,
        "How TF-TRT makes profiles of dynamic shapes; with Range alone the largest is fastest.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "min_segment_size",
        3,
        "Operations that a part of the graph must have to become an engine.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "workspace_mib",
        None,
        "Scratch memory of an engine in MiB; default: all that the GPU has.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "max_cached_engines", 1, "Engines that each part keeps.", flag_values=values
    )
    flags.DEFINE_bool(
        "tf32", True, "Whether float32 products may be computed in TF32.", flag_values=values
    )
    _flags.define_shapes(values)


def run(values: flags.FlagValues) -> int:
    """Runs the command."""
    _flags.require(values, "model", "output_dir")
    from tfopt.commands import convert
    from tfopt.variant import Variant

    options = {name: values[name].value for name in OPTIONS}
    if values.precision != "float32":
        del options["tf32"]
    given = tuple((name, value) for name, value in options.items() if value is not None)
    return convert.convert(values, str(Variant(values.precision, "tf_trt", given)))
