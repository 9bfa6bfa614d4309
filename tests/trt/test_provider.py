import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tfopt.artifact import Artifact
from tfopt.errors import ConversionError, InputError
from tfopt.signature import Signature, TensorSpec
from tfopt.trt import provider, provider_library
from tfopt.trt.profiles import Profile
from tfopt.trt.provider_library import TENSORRT
from tfopt.trt.spec import EngineSpec
from tfopt.variant import Variant

NOT_FOUND = "cannot open shared object file: No such file or directory"
DYNAMIC = Profile.parse("x:1x4", "x:8x4", "x:32x4")

without_tensorrt = pytest.mark.skipif(
    provider_library.missing() is None, reason="ONNX Runtime has TensorRT here"
)


def spec(precision="float32", **changes):
    return EngineSpec(precision, changes.pop("profile", Profile({})), **changes)


def options(wanted):
    """The options that depend on what is wanted, without the prefix."""
    found = provider.options(wanted, Path("folder", "engines"))
    assert found.pop("trt_engine_cache_enable") == "True"
    assert found.pop("trt_engine_cache_path") == str(Path("folder", "engines"))
    return {name.removeprefix("trt_"): value for name, value in found.items()}


@pytest.fixture
def onnx_file(tmp_path):
    def value(name):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4])

    nodes = [helper.make_node("Exp", ["x"], ["y"]), helper.make_node("Relu", ["y"], ["z"])]
    graph = helper.make_graph(nodes, "g", [value("x")], [value("z")])
    opset = [helper.make_opsetid("", 18)]
    file = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), file)
    return file


def test_options_of_precisions():
    plain = {
        "fp16_enable": "False",
        "int8_enable": "False",
        "layer_norm_fp32_fallback": "False",
        "builder_optimization_level": "3",
    }
    half = {"fp16_enable": "True", "layer_norm_fp32_fallback": "True"}
    assert options(spec()) == plain
    assert options(spec("float16")) == plain | half
    assert options(spec("int8")) == plain | half | {"int8_enable": "True"}
    assert options(spec("int8", is_strongly_typed=True)) == plain


def test_options_of_building():
    found = options(
        spec(
            profile=DYNAMIC,
            workspace_bytes=1 << 30,
            optimization_level=5,
            timing_cache=Path("cache", "gpu.timings"),
        )
    )
    assert found["max_workspace_size"] == str(1 << 30)
    assert found["builder_optimization_level"] == "5"
    assert found["timing_cache_enable"] == "True" and found["timing_cache_path"] == "cache/gpu"
    assert found["profile_min_shapes"] == "x:1x4"
    assert found["profile_opt_shapes"] == "x:8x4"
    assert found["profile_max_shapes"] == "x:32x4"


def test_what_there_is_no_option_for(monkeypatch):
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    with pytest.raises(ConversionError, match=r"TF32; set NVIDIA_TF32_OVERRIDE=0"):
        provider.check(spec(tf32=False), 10)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    provider.check(spec(tf32=False), 10)
    with pytest.raises(ConversionError, match="single layers in float32; build"):
        provider.check(spec("float16", float32_layers=("a",)), 10)
    typed = spec("float16", float32_layers=("a",), is_strongly_typed=True)
    provider.check(typed, 10)
    provider.check(typed, 11)
    with pytest.raises(ConversionError, match="for TensorRT 8; strongly typed networks"):
        provider.check(typed, 8)
    with pytest.raises(ConversionError, match="a float32 engine instead of int8"):
        provider.check(spec("int8"), 11)
    provider.check(spec("int8"), 8)


def test_advice_names_the_library_and_the_pip_line():
    index = "--extra-index-url https://pypi.nvidia.com"
    assert provider_library.advice(f"libnvinfer.so.10: {NOT_FOUND}", "13.0") == (
        f"libnvinfer.so.10 is missing; pip install 'tensorrt-cu13~=10.0' {index}."
    )
    assert provider_library.advice(f"libnvonnxparser.so.10: {NOT_FOUND}", "12.8") == (
        f"libnvonnxparser.so.10 is missing; pip install 'tensorrt-cu12~=10.0' {index}."
    )
    assert provider_library.advice(f"libnvinfer.so.8: {NOT_FOUND}", "") == (
        f"libnvinfer.so.8 is missing; pip install tensorrt-libs==8.6.1 {index}."
    )
    assert provider_library.advice(f"libcublas.so.13: {NOT_FOUND}", "13.0") == (
        "libcublas.so.13 is missing; pip install 'onnxruntime-gpu[cuda,cudnn]'."
    )
    assert provider_library.advice("undefined symbol: f", "13.0") == "undefined symbol: f."


@without_tensorrt
def test_missing_says_why_and_what_to_do():
    reason = provider_library.missing()
    if TENSORRT not in onnxruntime.get_available_providers():
        assert reason.endswith("pip uninstall -y onnxruntime && pip install onnxruntime-gpu.")
        assert "cannot open shared object file" in provider_library.unloadable()
        assert provider_library.linked() == 0
    assert provider_library.versions()["onnxruntime"] == onnxruntime.__version__


@without_tensorrt
def test_nothing_is_built_without_it(onnx_file, tmp_path):
    with pytest.raises(ConversionError) as error:
        provider.build(onnx_file, tmp_path, spec(profile=DYNAMIC))
    assert str(error.value) == provider_library.missing()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx"]


@without_tensorrt
def test_no_session_without_it(tmp_path):
    x = TensorSpec("x", (None, 4), "float32")
    signature = Signature("onnx", (x,), (TensorSpec("z", (None, 4), "float32"),))
    artifact = Artifact(
        tmp_path, Variant.parse("float16@tensorrt"), None, "0", signature, 0, 0, {}
    )  # fmt: skip
    with pytest.raises(ConversionError) as error:
        provider.ProviderSession(artifact, None)
    assert str(error.value) == provider_library.missing()


@without_tensorrt
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_onnx_runtime_does_not_go_on_without_it(onnx_file, capfd):
    chosen = provider.options(spec(profile=DYNAMIC), onnx_file.parent)
    with pytest.raises(ConversionError, match=r"model\.onnx"):
        provider._open(onnx_file, chosen, 1)
    assert "Falling back" not in capfd.readouterr().out


def test_zero_engines_is_a_failure_that_names_the_operators(onnx_file):
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(
        str(onnx_file), settings, providers=["CPUExecutionProvider"]
    )
    assigned = provider._assigned(session)
    assert sorted(assigned) == [("CPUExecutionProvider", "Exp"), ("CPUExecutionProvider", "Relu")]
    with pytest.raises(ConversionError, match=r"no part .* operators are Exp \(1\), Relu \(1\)"):
        provider.describe(assigned, 0)
    with pytest.raises(ConversionError, match=r"no part of the model to TensorRT\.$"):
        provider.describe([], 0)


def test_notes_on_what_runs_where():
    assigned = [
        (TENSORRT, "Conv"), (TENSORRT, "Relu"),
        ("CUDAExecutionProvider", "NonZero"), ("CPUExecutionProvider", "Shape"),
        ("CPUExecutionProvider", "Gather"), ("CPUExecutionProvider", "Gather"),
    ]  # fmt: skip
    assert provider.describe(assigned, 2) == (
        "2 of 6 nodes run in 2 engines of TensorRT.",
        "On CUDA stayed: NonZero.",
        "On CPU stayed: Gather, Shape.",
    )
    assert provider.describe(assigned[:2], 1) == ("2 of 2 nodes run in one engine of TensorRT.",)
    assert provider.describe([], 1) == ("The model runs in one engine of TensorRT.",)


def test_record_of_a_session(tmp_path):
    with pytest.raises(InputError, match=r"provider\.json is missing or damaged"):
        provider._read_record(tmp_path)
    for damaged in ("", "[]", '{"file": "a"}', '{"file": "a", "options": 1}'):
        (tmp_path / provider.RECORD).write_text(damaged)
        with pytest.raises(InputError, match="convert the model again"):
            provider._read_record(tmp_path)
    record = {"file": "model.onnx", "options": {"trt_fp16_enable": "True"}}
    (tmp_path / provider.RECORD).write_text(json.dumps(record))
    assert provider._read_record(tmp_path) == record


def test_engines_that_were_written_again_are_noticed(tmp_path):
    (tmp_path / "a.engine").write_bytes(b"1")
    before = provider._stamps(tmp_path)
    (tmp_path / "a.engine").read_bytes()
    assert provider._stamps(tmp_path) == before
    (tmp_path / "b.engine").write_bytes(np.zeros(1))
    assert provider._stamps(tmp_path) != before
