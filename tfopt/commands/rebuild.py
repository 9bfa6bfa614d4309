"""Build the TensorRT engines of an artifact anew for this machine.

For example: tfopt rebuild --artifact=run/best --output_dir=best_here
"""

from __future__ import annotations

from absl import flags

from tfopt.commands import _flags


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags."""
    flags.DEFINE_string("artifact", None, "Folder with the engines.", flag_values=values)
    flags.DEFINE_string("output_dir", None, "New folder for the artifact.", flag_values=values)
    flags.DEFINE_list("import_module", [], "Modules with custom ops.", flag_values=values)
    _flags.define_limits(values)


def run(values: flags.FlagValues) -> int:
    """Runs the command."""
    _flags.require(values, "artifact", "output_dir")
    from tfopt.api import rebuild

    artifact = rebuild(
        values.artifact,
        values.output_dir,
        import_modules=tuple(values.import_module),
        limits=_flags.limits(values),
    )
    print(f"{artifact.variant} in {artifact.folder}.")
    for note in artifact.notes:
        print(note)
    return 0
