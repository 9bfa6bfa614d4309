import dataclasses
import json
import os
import stat
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tfopt.cuda import OutOfMemoryError
from tfopt.errors import ConversionError
from tfopt.trt import free_inputs, memory, trtexec
from tfopt.trt.profiles import Profile
from tfopt.trt.spec import Built, EngineSpec

LOGS = Path(__file__).parent / "logs"
DYNAMIC = Profile.parse("x:1x4", "x:8x4", "x:32x4")


def spec(precision="float32", **changes):
    return EngineSpec(precision, changes.pop("profile", Profile({})), **changes)


def command(version, wanted):
    """The options that depend on what is wanted."""
    found = trtexec.command(
        Path("trtexec"), Path("a.onnx"), Path("a.engine"), Path("a.json"), wanted, version
    )
    assert found[:3] == ["trtexec", "--onnx=a.onnx", "--saveEngine=a.engine"]
    assert "--exportLayerInfo=a.json" in found and "--profilingVerbosity=detailed" in found
    assert "--skipInference" not in found and "--duration=1" in found
    return found[7:]


# --- what is called


@pytest.mark.parametrize("version", ["8.6.1", "10.0.1", "10.13.3", "11.0.0", "11.4.0"])
def test_float32_is_spelled_alike(version):
    assert command(version, spec()) == []
    assert command(version, spec(tf32=False)) == ["--noTF32"]
    shapes = ["--minShapes=x:1x4", "--optShapes=x:8x4", "--maxShapes=x:32x4"]
    assert command(version, spec(profile=DYNAMIC)) == shapes
    wanted = spec(workspace_bytes=3 << 29, timing_cache=Path("t.cache"))
    assert command(version, wanted) == [
        "--memPoolSize=workspace:1536", "--timingCacheFile=t.cache",
    ]  # fmt: skip


@pytest.mark.parametrize("version", ["8.6.1", "10.0.1", "10.13.3"])
def test_precisions_until_10(version):
    assert command(version, spec("float16")) == ["--fp16"]
    assert command(version, spec("int8")) == ["--int8", "--fp16"]
    assert command(version, spec("float16", float32_layers=("a/b:0", "c"))) == [
        "--fp16", "--precisionConstraints=obey", "--layerPrecisions=a/b:0:fp32,c:fp32",
        "--layerOutputTypes=a/b:0:fp32,c:fp32",
    ]  # fmt: skip
    with pytest.raises(ConversionError, match=r"Layer 'a,b' cannot be kept.*rename"):
        command(version, spec("float16", float32_layers=("a,b",)))


def test_strongly_typed_networks():
    typed = spec("float16", is_strongly_typed=True, float32_layers=("a",))
    assert command("10.13.3", typed) == ["--stronglyTyped"]
    assert command("11.0.0", typed) == []
    with pytest.raises(ConversionError, match=r"came with TensorRT 10"):
        command("8.6.1", typed)


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_no_float32_engine_instead_of_another(precision):
    with pytest.raises(ConversionError, match=f"no option for {precision}: TensorRT 11"):
        command("11.0.0", spec(precision))


def test_optimization_level():
    found = trtexec.command(
        Path("t"), Path("a"), Path("b"), Path("c"), spec(optimization_level=5), "10.0.1"
    )
    assert "--builderOptimizationLevel=5" in found


# --- building, by a program that shows a log


@pytest.fixture
def onnx_file(tmp_path):
    def value(name, shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    nodes = [helper.make_node("Add", ["x", "y"], ["z"])]
    graph = helper.make_graph(nodes, "g", [value("x", ["n", 4]), value("y", [1])],
                              [value("z", ["n", 4])])  # fmt: skip
    file = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph), file)
    return file


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Writes a `trtexec` that shows a log, and keeps how it was called."""

    def write(name, body="echo engine >$engine", status=0):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        file = folder / "trtexec"
        file.write_text(
            "#!/bin/sh\n"
            "echo '&&&& RUNNING TensorRT.trtexec [TensorRT v8601] # trtexec'\n"
            'test "$1" = --help && exit\n'
            f'echo "$@" >>{tmp_path}/calls\n'
            'for option in "$@"; do case $option in\n'
            "--saveEngine=*) engine=${option#*=};; --exportLayerInfo=*) layers=${option#*=};;\n"
            f"esac; done\n{body}\ncat {LOGS / name}\nexit {status}\n"
        )
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        return tmp_path / "calls"

    return write


def test_no_program(monkeypatch, tmp_path, onnx_file):
    monkeypatch.setenv("PATH", str(tmp_path))
    if trtexec.PACKAGED.is_file():
        pytest.skip("NVIDIA's packages are installed")
    assert trtexec.find() is None
    assert "apt-get install libnvinfer-bin" in trtexec.missing()
    with pytest.raises(ConversionError, match=r"neither on the PATH nor at"):
        trtexec.build(onnx_file, tmp_path / "e", spec(profile=DYNAMIC))


def test_program_that_cannot_be_started(program, tmp_path):
    program("10.9_passed.log")
    assert trtexec.missing() is None
    assert trtexec.version(trtexec.find()) == "8.6.1"
    file = tmp_path / "bin" / "trtexec"
    file.write_text("no program")
    assert trtexec.version(file) is None
    assert "cannot be started" in trtexec.missing()
    file.write_text("#!/bin/sh\necho '&&&& RUNNING TensorRT.trtexec [TensorRT v8401] # trtexec'")
    assert trtexec.missing().endswith("is of TensorRT 8.4.1; 8.6 is the oldest that tfopt knows.")


def test_build(program, tmp_path, onnx_file):
    layers = json.dumps({"Layers": [{"Name": "a", "LayerType": "Convolution"}], "Bindings": []})
    calls = program("10.9_passed.log", f"echo engine >$engine; echo '{layers}' >$layers")
    profile = Profile.parse("x:1x4,y:1", "x:8x4,y:1", "x:32x4,y:1")
    wanted = spec("float16", profile=profile, timing_cache=tmp_path / "new" / "t.cache")
    built = trtexec.build(onnx_file, tmp_path / "model.engine", wanted)
    assert built.builder == "trtexec 8.6.1" and built.seconds == 104.774
    assert built.layers == ({"Name": "a", "LayerType": "Convolution"},)
    assert built.figures == {
        "engine_bytes": round(231.019 * 2**20),
        "device_memory_bytes": round(446.209 * 2**20),
        "throughput_per_s": 8.66824,
        "latency_median_ms": 112.567,
        "gpu_compute_median_ms": 111.208,
        "host_to_device_median_ms": 0.769043,
        "device_to_host_median_ms": 0.609924,
    }
    assert built.notes == (
        "trtexec timed it for 1 s on NVIDIA GeForce RTX 3070 with random inputs of the optimal "
        "shapes: median latency 113 ms with copies, of which the GPU computes 111 ms.",
    )
    assert (tmp_path / "model.engine").read_text() == "engine\n"
    assert (tmp_path / "new").is_dir()
    called = calls.read_text()
    assert "--optShapes=x:8x4 " in called and "--fp16" in called  # y is fixed by the file


def test_failed_build_names_operator_and_node(program, tmp_path, onnx_file):
    program("8.0_unknown_operator.log", status=1)
    with pytest.raises(ConversionError, match=r"trtexec 8\.6\.1 built no engine: .*Round, at node"):
        trtexec.build(onnx_file, tmp_path / "e", spec(profile=DYNAMIC))
    assert not (tmp_path / "e").exists()


def test_passed_without_an_engine(program, tmp_path, onnx_file):
    program("10.9_passed.log", ": >$engine")
    with pytest.raises(ConversionError, match="built no engine: it ended with status 0"):
        trtexec.build(onnx_file, tmp_path / "e", spec(profile=DYNAMIC))


def test_smaller_workspaces_when_memory_runs_out(program, tmp_path, onnx_file):
    calls = program("10.3_out_of_memory.log", status=1)
    with pytest.raises(ConversionError, match=r"at last with a workspace of 1024 MiB; free memory"):
        trtexec.build(onnx_file, tmp_path / "e", spec(profile=DYNAMIC))
    sizes = [part for part in calls.read_text().split() if part.startswith("--memPoolSize")]
    assert sizes == [f"--memPoolSize=workspace:{size}" for size in (4096, 2048, 1024)]


def test_smaller_workspace_is_noted():
    def builder(wanted):
        if wanted.workspace_bytes > 300 << 20:
            raise OutOfMemoryError("none left")
        return Built("b", 1.0, notes=("a",))

    built = memory.build(builder, spec(workspace_bytes=1 << 30))
    assert built.notes == (
        "a",
        "The engine was built with a workspace of 256 MiB: with 1024 MiB the GPU ran out of "
        "memory.",
    )
    enough = spec(workspace_bytes=100 << 20)
    assert memory.build(builder, enough) == dataclasses.replace(built, notes=("a",))


def test_inputs_that_the_file_fixes_have_no_profile(onnx_file, tmp_path):
    profile = Profile.parse("x:1x4,y:1", "x:8x4,y:1", "x:32x4,y:1")
    assert free_inputs.restrict(profile, onnx_file) == DYNAMIC
    model = onnx.load(onnx_file)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = np.int64(8)
    onnx.save(model, tmp_path / "fixed.onnx")
    assert free_inputs.restrict(profile, tmp_path / "fixed.onnx") == Profile({})
