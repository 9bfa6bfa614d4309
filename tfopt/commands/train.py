"""Train or fine-tune a Keras model, in half precision where that is asked for.

For example: tfopt train --model=model.keras --data=data.npz --output_dir=trained
--precision=mixed_bfloat16 --epochs=10
"""

from __future__ import annotations

from absl import flags

from tfopt.commands import _flags


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags."""
    flags.DEFINE_string("model", None, "A .keras or .h5 file.", flag_values=values)
    flags.DEFINE_string(
        "data",
        None,
        "FILE.npz with arrays named as the model's inputs (or x) and labels y, each optionally as "
        "…_train, which is trained on, and …_test; or package.module:function that returns what "
        "fit takes, or a pair of that for training and validation.",
        flag_values=values,
    )
    flags.DEFINE_string("output_dir", None, "New folder for the trained model.", flag_values=values)
    flags.DEFINE_enum(
        "precision",
        "float32",
        ["float32", "mixed_bfloat16", "mixed_float16", "recommended"],
        "Policy of the layers; recommended is what this hardware gains from.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "keep_float32",
        [],
        "Layers that stay in float32: names, paths like block3/conv1, or regular expressions.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "max_error",
        None,
        "Choose the layers that gain most by half precision while the outputs are off by no more "
        "than this share of their spread, such as 0.05.",
        flag_values=values,
    )
    flags.DEFINE_integer("epochs", 1, "That the model is trained for in all.", flag_values=values)
    flags.DEFINE_integer("batch_size", 32, "Examples in a step.", flag_values=values)
    flags.DEFINE_float(
        "learning_rate", None, "Instead of the one it was compiled with.", flag_values=values
    )
    flags.DEFINE_bool(
        "jit_compile",
        None,
        "Compile with XLA; by default if the model was compiled with jit_compile=True.",
        flag_values=values,
    )
    flags.DEFINE_integer("seed", 0, "Of the order of examples and dropout.", flag_values=values)
    flags.DEFINE_string(
        "custom_objects",
        None,
        "package.module with the Keras layers and functions that the file needs.",
        flag_values=values,
    )
    _flags.define_trust(values)
    flags.DEFINE_bool("resume", False, "Go on with an interrupted run.", flag_values=values)
    flags.DEFINE_bool(
        "overwrite", False, "Delete what an earlier run left in the folder.", flag_values=values
    )
    flags.DEFINE_bool("quiet", False, "Print no progress.", flag_values=values)


def run(values: flags.FlagValues) -> int:
    """Runs the command."""
    _flags.require(values, "model", "data", "output_dir")
    from tfopt.train.fine_tune import fine_tune
    from tfopt.train.recommendation import recommend_precision

    precision, max_error = values.precision, values.max_error
    if precision == "recommended":
        advice = recommend_precision()
        print(advice)
        precision = advice.policy
        max_error = None if precision == "float32" else max_error
    training = fine_tune(
        values.model,
        values.data,
        values.output_dir,
        precision=precision,
        keep_float32=values.keep_float32,
        max_error=max_error,
        epochs=values.epochs,
        batch_size=values.batch_size,
        learning_rate=values.learning_rate,
        jit_compile=values.jit_compile,
        seed=values.seed,
        custom_objects=values.custom_objects,
        trust_model=values.trust_model,
        resume=values.resume,
        overwrite=values.overwrite,
        quiet=values.quiet,
    )
    print(training.summary)
    return 0
