"""Convert a model to one variant.

For example: tfopt convert --model=saved_model --variant=int8@litert --data=data.npz
--output_dir=int8, or with TensorRT for batches of 1 to 64:
tfopt convert --model=saved_model --variant='float16(shapes=dynamic)@tf_trt' --output_dir=engines
--min_shapes=image:1x224x224x3 --opt_shapes=image:8x224x224x3 --max_shapes=image:64x224x224x3
"""

from __future__ import annotations

from absl import flags

from tfopt.commands import _flags


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags."""
    _flags.define_model(values)
    _flags.define_data(values)
    _flags.define_limits(values)
    flags.DEFINE_string("variant", None, "For example int8@litert.", flag_values=values)
    flags.DEFINE_string("output_dir", None, "New folder for the artifact.", flag_values=values)
    flags.DEFINE_integer("batch_size", 1, "For runtimes that need a fixed one.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of the choice of examples.", flag_values=values)
    _flags.define_engine(values)


def run(values: flags.FlagValues) -> int:
    """Runs the command."""
    _flags.require(values, "model", "variant", "output_dir")
    return convert(values, values.variant)


def convert(values: flags.FlagValues, variant: str) -> int:
    """Converts to a variant and says what came of it."""
    from tfopt import api
    from tfopt.compare.text import size

    artifact = api.convert(
        values.model,
        variant,
        values.output_dir,
        values.data,
        batch_size=values.batch_size,
        seed=values.seed,
        num_calibration=values.num_calibration,
        engine=_flags.engine(values),
        limits=_flags.limits(values),
        **_flags.source_options(values),
    )
    print(f"{artifact.variant} in {artifact.folder}, {size(artifact.size_bytes)}.")
    for note in artifact.notes:
        print(note)
    return 0
