"""What of building engines can be seen without TensorRT.

Its objects are stood in for by plain ones with the members that `test_surface.py` finds in every
version.
"""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from onnx import TensorProto, helper

from tfopt.errors import ConversionError
from tfopt.trt import bindings, build
from tfopt.trt.build import Surface
from tfopt.trt.profiles import Profile
from tfopt.trt.spec import EngineSpec

LOGS = Path(__file__).parent / "logs"
LATE, EARLY = Surface(False, False, True, True), Surface(True, True, False, False)
FLOAT, HALF, INT32 = "FLOAT", "HALF", "INT32"
without_tensorrt = pytest.mark.skipif(
    any(importlib.util.find_spec(name) for name in ("tensorrt", "tensorrt_bindings")),
    reason="TensorRT is installed",
)


@without_tensorrt
def test_without_the_package_it_says_what_to_install():
    assert bindings.missing() == (
        "NVIDIA's package tensorrt is not installed; pip install tensorrt-cu12, or tensorrt-cu13 "
        "where the driver is of CUDA 13."
    )


@without_tensorrt
class TestInstalled:
    """What is on the path decides: bindings without libraries, or bindings alone."""

    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch, tmp_path):
        monkeypatch.syspath_prepend(tmp_path)
        bindings.missing.cache_clear()
        yield
        bindings.missing.cache_clear()
        for name in ("tensorrt", "tensorrt_bindings"):
            sys.modules.pop(name, None)

    def test_a_missing_library_is_named(self, monkeypatch, tmp_path):
        text = "libnvinfer.so.10: cannot open shared object file: No such file or directory"
        (tmp_path / "tensorrt.py").write_text(f"raise ImportError({text!r})\n")

        def version(package):
            if package == "tensorrt-cu12-bindings":
                return "10.13.3.9"
            raise importlib.metadata.PackageNotFoundError(package)

        monkeypatch.setattr(importlib.metadata, "version", version)
        assert bindings.missing() == (
            f"TensorRT's libraries cannot be loaded ({text}); pip install "
            "tensorrt-cu12-libs==10.13.3.9 --extra-index-url https://pypi.nvidia.com, or put "
            "their folder on LD_LIBRARY_PATH."
        )

    def test_the_bindings_alone_will_do(self, tmp_path):
        (tmp_path / "tensorrt_bindings.py").write_text("__version__ = '8.6.1'\n")
        assert bindings.load().__version__ == "8.6.1"
        assert bindings.version() == "8.6.1"  # there is no library that says another

    def test_what_the_package_lacks_is_not_taken_for_it(self, tmp_path):
        (tmp_path / "tensorrt.py").write_text("import a_module_that_is_not_there\n")
        (tmp_path / "tensorrt_bindings.py").write_text("")
        with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
            bindings.load()


# --- errors


def model_file(folder):
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="first"),
        helper.make_node("Einsum", ["a", "a"], ["y"], name="attention/einsum", equation="ij,ij->i"),
    ]
    graph = helper.make_graph(
        nodes, "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
    )  # fmt: skip
    onnx.save_model(helper.make_model(graph), folder / "model.onnx")
    return folder / "model.onnx"


def parser(reason, **members):
    members = {name: lambda value=value: value for name, value in members.items()}
    error = SimpleNamespace(desc=lambda: reason, **members)
    return SimpleNamespace(num_errors=1, get_error=lambda index: error)


def test_the_parser_names_operator_and_layer(tmp_path):
    found = parser("No importer.\n", node=1, node_name="a/einsum", node_operator="Einsum")
    assert build._refusal(found, LATE, None, tmp_path / "none") == (
        "TensorRT cannot take Einsum (layer a/einsum): No importer."
    )
    unnamed = parser("No importer.", node=1, node_name="", node_operator="Einsum")
    assert "Einsum (layer 1):" in build._refusal(unnamed, LATE, None, tmp_path / "none")


def test_8_tells_the_place_alone_and_the_file_the_rest(tmp_path):
    file = model_file(tmp_path)
    assert build._refusal(parser("No importer.", node=1), EARLY, None, file) == (
        "TensorRT cannot take Einsum (layer attention/einsum): No importer."
    )
    for place in (-1, 7):
        assert build._refusal(parser("Why.", node=place), EARLY, None, file) == (
            f"TensorRT cannot take the model at node {place}: Why."
        )


def test_a_file_that_is_no_model_has_the_logger_s_reason(tmp_path):
    logger = SimpleNamespace(reason=lambda: "the file is damaged")
    nothing = SimpleNamespace(num_errors=0)
    assert build._refusal(nothing, EARLY, logger, tmp_path) == (
        "TensorRT cannot read the ONNX file: the file is damaged"
    )


def test_the_process_has_one_logger(monkeypatch):
    """TensorRT passes over a second one while any object lives."""

    class Base:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

    registered = []
    trt = SimpleNamespace(
        ILogger=Base, init_libnvinfer_plugins=lambda logger, name: registered.append(logger)
    )
    monkeypatch.setattr(bindings, "load", lambda: trt)
    bindings.the_logger.cache_clear()
    try:
        logger = bindings.the_logger()
        assert logger is bindings.the_logger()
        assert registered == [logger]
        assert logger.reason() == "it does not say why."
        logger.log(Base.WARNING, "a warning")
        logger.log(Base.ERROR, "4: [network.cpp::validate::1]\n  Error Code 4")
        logger.log(Base.INTERNAL_ERROR, "a later one")
        assert logger.reason() == "4: [network.cpp::validate::1] Error Code 4"
    finally:
        bindings.the_logger.cache_clear()


@pytest.mark.parametrize(
    "text",
    [
        (LOGS / "10.3_out_of_memory.log").read_text(),
        "2: [virtualMemoryBuffer.cpp::resizePhysical::140] Error Code 2: OutOfMemory (no further "
        "information)",
    ],
)
def test_out_of_memory_is_told_from_other_errors(text):
    assert build._MEMORY.search(text)
    assert not build._MEMORY.search((LOGS / "8.0_unknown_operator.log").read_text())


# --- networks


def tensor(name, shape, dtype=FLOAT, is_shape_tensor=False):
    return SimpleNamespace(name=name, shape=shape, dtype=dtype, is_shape_tensor=is_shape_tensor)


class Shapes:
    """An optimization profile."""

    def __init__(self):
        self.set = {}

    def set_shape(self, name, *shapes):
        if shapes[0] == (13, 4):
            raise RuntimeError("inconsistent")
        self.set[name] = shapes


def add_profile(profile, *inputs, index=0):
    shapes, added = Shapes(), []
    builder = SimpleNamespace(create_optimization_profile=lambda: shapes)
    network = SimpleNamespace(num_inputs=len(inputs), get_input=lambda i: inputs[i])
    config = SimpleNamespace(add_optimization_profile=lambda found: added.append(found) or index)
    build._add_profile(None, builder, network, config, EngineSpec("float32", profile))
    return shapes.set if added else None


class TestProfiles:
    PROFILE = Profile.parse("x:1x4,mask:4", "x:8x4,mask:4", "x:32x4,mask:4")

    def test_free_inputs_get_shapes(self):
        found = add_profile(self.PROFILE, tensor("x", (-1, 4)), tensor("mask", (4,)))
        assert found == {"x": ((1, 4), (8, 4), (32, 4))}

    def test_fixed_networks_need_none(self):
        assert add_profile(self.PROFILE, tensor("x", (8, 4)), tensor("mask", (4,))) is None

    def test_inputs_that_are_shapes_are_refused(self):
        with pytest.raises(ConversionError, match="values of input mask decide on the shapes"):
            add_profile(self.PROFILE, tensor("mask", (4,), INT32, is_shape_tensor=True))

    def test_what_tensorrt_refuses_is_said(self):
        wrong = Profile.parse("x:13x4", "x:13x4", "x:13x4")
        with pytest.raises(ConversionError, match="refuses the shapes 13x4 of input x: incons"):
            add_profile(wrong, tensor("x", (-1, 4)))
        with pytest.raises(ConversionError, match="refuses the shapes that the engine"):
            add_profile(self.PROFILE, tensor("x", (-1, 4)), index=-1)


class Made:
    """A layer."""

    def __init__(self, name, kind, *dtypes, metadata=""):
        self.name, self.metadata, self.type = name, metadata, SimpleNamespace(name=kind)
        self.num_outputs = len(dtypes)
        self.outputs = [tensor(f"{name}:{i}", (1,), dtype) for i, dtype in enumerate(dtypes)]
        self.precision = None
        self.types = {}

    def get_output(self, index):
        return self.outputs[index]

    def set_output_type(self, index, dtype):
        self.types[index] = dtype


def test_layers_are_kept_in_float32_by_the_names_of_their_nodes():
    trt = SimpleNamespace(DataType=SimpleNamespace(FLOAT=FLOAT, HALF=HALF))
    found = [
        Made("a/softmax", "SOFTMAX", FLOAT),
        Made("a/softmax_3", "SHUFFLE", HALF, metadata="[ONNX Layer: a/softmax]"),
        Made("b", "CONVOLUTION", FLOAT, metadata="[ONNX Layer: b]"),
        Made("a/topk", "TOPK", FLOAT, INT32),
        Made("a/shape", "SHAPE", INT32),
        Made("a/weights", "CONSTANT", FLOAT),
    ]
    network = SimpleNamespace(num_layers=len(found), get_layer=lambda index: found[index])
    build._keep_float32(trt, network, ("a/softmax", "a/topk", "a/shape", "a/weights"))
    assert [layer.precision for layer in found] == [FLOAT, FLOAT, None, FLOAT, None, None]
    assert [layer.types for layer in found] == [{0: FLOAT}, {0: FLOAT}, {}, {0: FLOAT}, {}, {}]


# --- timings


def test_timings_are_read_and_written(tmp_path):
    file, seen = tmp_path / "folder" / "gpu.timings", []

    def create(content):
        seen.append(content)
        return SimpleNamespace(serialize=lambda: content + b"+")

    def take(timings, ignore_mismatch):
        seen.append(ignore_mismatch)
        return True

    config = SimpleNamespace(create_timing_cache=create, set_timing_cache=take)
    assert build._timing_cache(config, None, None) is None
    for _ in range(2):
        build._save_timings(file, build._timing_cache(config, file, None))
    assert seen == [b"", False, b"+", False]
    assert file.read_bytes() == b"++"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("is_read", [True, False])
def test_timings_of_another_version_are_begun_anew(tmp_path, is_read):
    """TensorRT logs errors, which are not why a build fails later, and attaches nothing."""
    file = tmp_path / "gpu.timings"
    file.write_bytes(b"old")
    logger = SimpleNamespace(messages=["The timing cache will not be used!"])

    def create(content):
        if content and not is_read:
            return None
        return SimpleNamespace(content=content, serialize=lambda: b"new")

    config = SimpleNamespace(
        create_timing_cache=create,
        set_timing_cache=lambda timings, ignore_mismatch: not timings.content,
    )
    build._save_timings(file, build._timing_cache(config, file, logger))
    assert file.read_bytes() == b"new"
    assert logger.messages == []


def test_timings_without_a_place_are_let_go(tmp_path):
    (tmp_path / "file").write_text("")
    timings = SimpleNamespace(serialize=lambda: b"timings")
    build._save_timings(tmp_path / "file" / "gpu.timings", timings)
