"""Train a small model on what larger ones say, with labels or without.

For example: tfopt distill --teachers=wide.keras,other_saved_model
"--student=teacher(width=0.5,depth=0.5)" --data=data.npz --output=student.keras --epochs=50
"""

from __future__ import annotations

from absl import flags

from tfopt.commands import _flags


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags."""
    flags.DEFINE_list(
        "teachers",
        [],
        "Trained models: .keras and .h5 files, SavedModels, and folders of artifacts that tfopt "
        "convert made.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "student",
        None,
        "A .keras or .h5 file; teacher(width=0.5,depth=0.5), the first Keras teacher made smaller, "
        "with new weights; a name of keras.applications, such as MobileNetV2(alpha=0.5); or "
        "package.module:function that returns a built model.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "data",
        None,
        "FILE.npz with arrays named as the student's inputs (or x) and labels y, each optionally "
        "as …_train, which is trained on, and …_test; or package.module:function that returns what "
        "fit takes. Labels may be missing, all of them or those that are -1.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "output",
        None,
        "New .keras file, or .h5 for a student of tf_keras; a folder of the same name without the "
        "ending holds what is needed to go on.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "alpha", 0.1, "Share of the loss against labels, 0 to 1.", flag_values=values
    )
    flags.DEFINE_float(
        "temperature", None, "Of soft or decoupled targets; default: 4.", flag_values=values
    )
    flags.DEFINE_string(
        "loss",
        None,
        "Of outputs against teachers: soft_targets, decoupled, squared_error or relational; "
        "default: soft targets for classes, the squared error for values.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "features",
        [],
        "Pairs student_layer:teacher_layer of the first teacher, with hint, attention or "
        "relational and a weight behind if needed, as in block2:block4:attention:100.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "view",
        None,
        "Random views that student and teachers both see: crop_and_flip, mixup, or both with a "
        "comma.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "num_views",
        None,
        "Keep what teachers say about so many views of each example, which come again in turn.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "cache",
        True,
        "Ask the teachers once and keep what they say; with a view only if --num_views is given.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "precision",
        "float32",
        ["float32", "mixed_bfloat16", "mixed_float16"],
        "Policy of the student's layers.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "keep_float32",
        [],
        "Layers that stay in float32: names, paths like block3/conv1, or regular expressions.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "epochs", 10, "In all, those before an interruption included.", flag_values=values
    )
    flags.DEFINE_integer("batch_size", 32, "Examples in a step.", flag_values=values)
    flags.DEFINE_float("learning_rate", None, "Of Adam; default: 0.001.", flag_values=values)
    flags.DEFINE_bool("jit_compile", False, "Compile steps with XLA.", flag_values=values)
    flags.DEFINE_integer(
        "seed", 0, "Of weights, order of examples, views and dropout.", flag_values=values
    )
    flags.DEFINE_string(
        "custom_objects",
        None,
        "package.module with the Keras layers and functions that files need.",
        flag_values=values,
    )
    _flags.define_trust(values)
    flags.DEFINE_bool("resume", False, "Go on with an interrupted run.", flag_values=values)
    flags.DEFINE_bool(
        "overwrite",
        False,
        "Replace the output, and delete what an earlier run left in its folder.",
        flag_values=values,
    )
    flags.DEFINE_bool("quiet", False, "Print no progress.", flag_values=values)


def run(values: flags.FlagValues) -> int:
    """Runs the command."""
    _flags.require(values, "teachers", "student", "data", "output")
    from tfopt.distillation.distill import distill

    distillation = distill(
        values.teachers,
        values.student,
        values.data,
        values.output,
        alpha=values.alpha,
        temperature=values.temperature,
        loss=values.loss,
        features=values.features,
        view=values.view,
        num_views=values.num_views,
        cache=values.cache,
        precision=values.precision,
        keep_float32=values.keep_float32,
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
    print(distillation.summary)
    return 0
