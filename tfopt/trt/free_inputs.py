"""Which inputs of an ONNX file have free dimensions: profiles are for these alone."""

from __future__ import annotations

from pathlib import Path

from tfopt.trt.profiles import Profile


def restrict(profile: Profile, onnx_file: Path) -> Profile:
    """The profile without the inputs whose shape the file fixes.

    `trtexec` refuses shapes of a file without free dimensions, and ONNX Runtime compares the
    profile that it is given with one of the free inputs when it looks into its cache.

    Returns:
      A profile that has no inputs where the file fixes all of them.
    """
    import onnx

    graph = onnx.load(onnx_file, load_external_data=False).graph
    free = {
        value.name
        for value in graph.input
        if not all(size.HasField("dim_value") for size in value.type.tensor_type.shape.dim)
    }
    return Profile({name: shapes for name, shapes in profile.inputs.items() if name in free})
