"""What the code calls of TensorRT's Python API is there in each version that it is for.

The members of each version were read from its bindings; see surfaces/README.md.
"""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import tfopt.trt
from tfopt.errors import ConversionError
from tfopt.trt import build
from tfopt.trt.build import Surface
from tfopt.trt.profiles import Profile
from tfopt.trt.spec import EngineSpec

FOLDER = Path(__file__).parent / "surfaces"
VERSIONS = {file.stem: json.loads(file.read_text())["members"] for file in FOLDER.glob("*.json")}
FILES = [
    Path(tfopt.trt.__file__).parent / name for name in ("bindings.py", "build.py", "session.py")
]
PROFILE = Profile.parse(*["image:1x3x8x8"] * 3)

# What is not in every version, with where the code asks first.
GUARDED = {
    ("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH"): "Surface.has_explicit_batch",
    ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"): "Surface.has_strong_typing",
    ("BuilderFlag", "FP16"): "Surface.has_precision_flags",
    ("BuilderFlag", "INT8"): "Surface.has_precision_flags",
    ("BuilderFlag", "OBEY_PRECISION_CONSTRAINTS"): "Surface.has_precision_flags",
    ("ParserError", "node_name"): "Surface.has_named_errors",
    ("ParserError", "node_operator"): "Surface.has_named_errors",
    ("ILayer", "precision"): "Surface.has_precision_flags",
    ("ILayer", "set_output_type"): "Surface.has_precision_flags",
    ("ICudaEngine", "device_memory_size"): "getattr",
    ("ICudaEngine", "device_memory_size_v2"): "getattr",
}

# Which class a variable of the code holds.
HOLDS = {
    "trt": None,
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "error": "ParserError",
    "config": "IBuilderConfig",
    "layer": "ILayer",
    "tensor": "ITensor",
    "profile": "IOptimizationProfile",
    "timings": "ITimingCache",
    "engine": "ICudaEngine",
    "_engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "context": "IExecutionContext",
    "_context": "IExecutionContext",
    "_runtime": "Runtime",
}


def calls(file):
    """(class, member) of every TensorRT attribute that a file uses."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Attribute) or node.attr.startswith("__"):
            continue
        owner = node.value
        if isinstance(owner, ast.Attribute) and getattr(owner.value, "id", "") == "trt":
            found.add((owner.attr, node.attr))  # trt.BuilderFlag.TF32
            continue
        attribute = getattr(owner, "attr", "")  # of self, such as self._engine
        name = getattr(owner, "id", attribute if attribute.startswith("_") else "")
        if name not in HOLDS:
            continue
        if HOLDS[name] is None:
            found.add((node.attr, None))
        else:
            found.add((HOLDS[name], node.attr))
    return found


def module(version):
    """A stand-in with the classes of a version and their members, and nothing else."""
    return SimpleNamespace(
        **{
            name: SimpleNamespace(**dict.fromkeys(members, 0))
            for name, members in VERSIONS[version].items()
        }
    )


def test_the_versions_are_those_that_the_issue_of_support_is_about():
    assert {version.split(".")[0] for version in VERSIONS} == {"8", "10", "11"}


def test_something_is_looked_at():
    found = set().union(*map(calls, FILES))
    assert ("Builder", "build_serialized_network") in found
    assert ("IExecutionContext", "execute_async_v3") in found
    assert ("MemoryPoolType", "WORKSPACE") in found
    assert len(found) > 40


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_called_is_there(file, version):
    members = VERSIONS[version]
    for owner, member in sorted(calls(file), key=str):
        if owner == "__version__" or (owner, member) in GUARDED:
            continue
        assert owner in members, f"TensorRT {version} has no {owner}"
        if member is not None:
            assert member in members[owner], f"TensorRT {version} has no {owner}.{member}"


def test_guards_are_needed():
    for owner, member in GUARDED:
        has = [member in members[owner] for members in VERSIONS.values()]
        assert any(has), f"no version has {owner}.{member}"
        assert not all(has), f"every version has {owner}.{member}"


# By NVIDIA's documentation: explicit batches must be asked for until 8, are the only kind since 10,
# where the flag is there still; strongly typed networks came with 10; 11 has nothing else.
DECISIONS = {
    "8.6.1": Surface(True, True, False, False),
    "10.0.1": Surface(True, True, True, True),
    "10.13.3": Surface(True, True, True, True),
    "11.0.0": Surface(False, False, True, True),
    "11.4.0": Surface(False, False, True, True),
}


def spec(precision, is_strongly_typed=False, layers=(), tf32=True):
    return EngineSpec(
        precision, PROFILE, tf32, float32_layers=layers, is_strongly_typed=is_strongly_typed
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_decisions_follow_the_documentation(version):
    assert Surface.of(module(version)) == DECISIONS[version]


@pytest.mark.parametrize("version", ["8.6.1", "10.13.3"])
def test_flags_where_there_are_flags(version):
    surface = DECISIONS[version]
    assert surface.network_flags(spec("int8")) == ("EXPLICIT_BATCH",)
    assert surface.builder_flags(spec("int8")) == ("FP16", "INT8", "TF32")
    assert surface.builder_flags(spec("float16", tf32=False)) == ("FP16",)
    assert surface.builder_flags(spec("float32")) == ("TF32",)
    kept = surface.builder_flags(spec("float16", layers=("a",)))
    assert kept == ("FP16", "OBEY_PRECISION_CONSTRAINTS", "TF32")
    assert surface.builder_flags(spec("float32", layers=("a",))) == ("TF32",)


def test_types_where_there_are_types_only():
    surface = DECISIONS["11.4.0"]
    assert surface.network_flags(spec("float16", True)) == ("STRONGLY_TYPED",)
    assert surface.builder_flags(spec("float16", True)) == ("TF32",)
    assert surface.network_flags(spec("float32")) == ()
    with pytest.raises(ConversionError, match="no flag for int8; its engines take their types"):
        surface.network_flags(spec("int8"))


def test_strong_types_of_each():
    typed = spec("float16", True)
    assert DECISIONS["10.0.1"].network_flags(typed) == ("EXPLICIT_BATCH", "STRONGLY_TYPED")
    assert DECISIONS["10.0.1"].builder_flags(typed) == ("TF32",)
    with pytest.raises(ConversionError, match="no strongly typed networks; 10 has them"):
        DECISIONS["8.6.1"].network_flags(typed)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_flag_that_is_chosen_is_there(version):
    members, surface = VERSIONS[version], Surface.of(module(version))
    for precision in build.PRECISION_FLAGS:
        asked = spec(precision, not surface.has_precision_flags and precision != "float32", ("a",))
        flags = surface.network_flags(asked)
        assert set(flags) <= set(members["NetworkDefinitionCreationFlag"])
        assert set(surface.builder_flags(asked)) <= set(members["BuilderFlag"])
