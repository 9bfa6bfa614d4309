"""What the conformance tests do not reach: the choices that a GPU makes.

Conversions need none; what runs on one is tried where ONNX Runtime finds it.
"""

import statistics
import time

import numpy as np
import onnx
import pytest

from tests import nvidia_smi
from tests.onnx import models
from tfopt import cuda, runtimes, source
from tfopt.artifact import Artifact
from tfopt.errors import ConversionError, InputError
from tfopt.measure import environment
from tfopt.runtimes import onnxruntime
from tfopt.runtimes.base import Conversion
from tfopt.variant import Variant

RUNTIME = runtimes.get("onnxruntime")
HAS_CUDA = onnxruntime._providers()[0] == onnxruntime.CUDA
with_cuda = pytest.mark.skipif(not HAS_CUDA, reason="ONNX Runtime has no CUDA here")
without_cuda = pytest.mark.skipif(HAS_CUDA, reason="ONNX Runtime has CUDA here")


def test_outputs_that_are_no_tensors_are_refused_by_name(tmp_path):
    """As scikit-learn classifiers have them when exported with the defaults of skl2onnx."""
    helper, to_float = onnx.helper, onnx.TensorProto.FLOAT
    numbers = helper.make_tensor_type_proto(to_float, [])
    maps = helper.make_map_type_proto(onnx.TensorProto.INT64, numbers)
    graph = helper.make_graph(
        [
            helper.make_node(
                "ZipMap", ["x"], ["probabilities"], domain="ai.onnx.ml", classlabels_int64s=[0, 1]
            )
        ],
        "classifier",
        [helper.make_tensor_value_info("x", to_float, [None, 2])],
        [helper.make_value_info("probabilities", helper.make_sequence_type_proto(maps))],
    )
    opsets = [helper.make_opsetid("", 15), helper.make_opsetid("ai.onnx.ml", 2)]
    file = tmp_path / "classifier.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=opsets, ir_version=8), file)
    with pytest.raises(InputError, match="'probabilities' of the ONNX file is a sequence, and"):
        source.prepare(file, tmp_path / "source")


@pytest.fixture
def convert(tmp_path):
    """Converts a small model; the artifact is not run."""
    onnx.save_model(models.conv_relu_gemm(), tmp_path / "model.onnx")
    prepared = source.prepare(tmp_path / "model.onnx", tmp_path / "source")

    def convert(text, parent=None, batches=None):
        variant = Variant.parse(text)
        folder = tmp_path / variant.slug
        folder.mkdir()
        given = models.batches() if batches is None else batches
        conversion = Conversion(
            source=prepared,
            folder=folder,
            parent=parent,
            batch_size=8,
            calibration=lambda: iter(given),
            notes=[],
            signature=prepared.signature,
            num_calibration=sum(len(batch["x"]) for batch in given),
        )
        RUNTIME.convert(variant, conversion)
        return Artifact(
            folder, variant, RUNTIME.parent(variant), prepared.sha256, prepared.signature,
            0, 0, {}, tuple(conversion.notes), tuple(conversion.needs),
        )  # fmt: skip

    return convert


@pytest.fixture
def as_with_cuda(monkeypatch):
    monkeypatch.setattr(onnxruntime, "_providers", lambda: [onnxruntime.CUDA, onnxruntime.CPU])


@without_cuda
class TestProcessors:
    """Both kinds on any processor: the conversion asks which one it is."""

    @pytest.mark.parametrize("precision", ["int8", "dynamic_range"])
    @pytest.mark.parametrize(("has_vnni", "limit"), [(True, 127), (False, 64)])
    def test_weights_have_as_many_bits_as_sums_allow(
        self, precision, has_vnni, limit, convert, monkeypatch
    ):
        monkeypatch.setattr(environment, "has_vnni", lambda: has_vnni)
        found = convert(f"{precision}@onnxruntime", convert("float32@onnxruntime"))
        model = onnx.load(found.folder / onnxruntime.FILE)
        weights = [
            onnx.numpy_helper.to_array(tensor)
            for tensor in model.graph.initializer
            if tensor.data_type == onnx.TensorProto.INT8 and tensor.dims and min(tensor.dims) > 0
        ]
        largest = max(int(np.abs(array.astype(int)).max()) for array in weights if array.ndim > 1)
        assert limit - 1 <= largest <= limit
        assert found.needs == (("vnni",) if has_vnni else ())
        assert any("7 bits" in note for note in found.notes) is not has_vnni

    def test_artifacts_remember_what_they_need(self, convert, monkeypatch):
        monkeypatch.setattr(environment, "has_vnni", lambda: True)
        made = convert("int8@onnxruntime", convert("float32@onnxruntime"))
        made.save()
        artifact = Artifact.open(made.folder)
        assert artifact.needs == ("vnni",)
        runtimes.load(artifact).close()
        monkeypatch.setattr(environment, "has_vnni", lambda: False)
        with pytest.raises(InputError, match="processors with VNNI or AMX, and this one has"):
            runtimes.load(artifact)


class TestRemarks:
    @pytest.fixture
    def remarks(self, monkeypatch, tmp_path):
        """What is said of a machine with these GPUs."""

        def ask(*gpus):
            nvidia_smi.install(tmp_path / "bin", monkeypatch, *gpus)
            environment.gpus.cache_clear()
            onnxruntime._providers.cache_clear()
            return RUNTIME.remarks()

        yield ask
        monkeypatch.undo()
        environment.gpus.cache_clear()
        onnxruntime._providers.cache_clear()

    def test_none_without_a_gpu(self, monkeypatch):
        monkeypatch.setattr(environment, "gpus", tuple)
        assert RUNTIME.remarks() == []

    @without_cuda
    def test_gpu_that_the_package_cannot_use(self, remarks):
        (remark,) = remarks(nvidia_smi.H200_IDLE)
        assert "on the processor and not on NVIDIA H200" in remark
        assert "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'" in remark

    def test_gpu(self, monkeypatch, as_with_cuda):
        gpu = environment.Gpu("NVIDIA H100", "580.1")
        monkeypatch.setattr(environment, "gpus", lambda: (gpu,))
        assert RUNTIME.remarks() == ["It computes on NVIDIA H100 (CUDA)."]


class TestConversionForCuda:
    """The processor can run these, too."""

    def test_int8_is_symmetric(self, monkeypatch, as_with_cuda, convert):
        parent = convert("float32@onnxruntime")
        artifact = convert("int8@onnxruntime", parent)
        assert "zero points of 0" in artifact.notes[0]
        values = models.arrays(onnx.load(artifact.folder / "model.onnx"))
        zeros = [value for name, value in values.items() if name.endswith("_zero")]
        assert {value.dtype.name for value in zeros} == {"int8"}
        assert not any(value.any() for value in zeros)
        assert {value.dtype.name for value in values.values() if value.ndim > 1} == {"int8"}

        monkeypatch.setattr(onnxruntime, "_providers", lambda: [onnxruntime.CPU])
        with RUNTIME.load(artifact, 1) as session:
            found = session.run({"x": models.EXAMPLES})["y"]
        wanted = models.run(models.conv_relu_gemm(), models.EXAMPLES)
        assert models.error(found, wanted) < 0.03

    def test_tensors_are_looked_at_once(self, as_with_cuda, convert, tmp_path):
        """Though each reader has a pair of its own."""
        weights = {"v": models.random(4, 3, 1, 1), "w": models.random(4, 3, 1, 1, seed=1)}
        model = models.make(
            [
                onnx.helper.make_node("Conv", ["x", "v"], ["a"]),
                onnx.helper.make_node("Conv", ["x", "w"], ["b"]),
                onnx.helper.make_node("Add", ["a", "b"], ["y"]),
            ],
            weights,
            ["n", 3, 6, 6],
            ["n", 4, 6, 6],
        )
        parent = convert("float32@onnxruntime")
        onnx.save_model(model, parent.folder / "model.onnx")
        artifact = convert("int8@onnxruntime", parent)
        found = list(RUNTIME.activations(artifact, models.batches()[:1]))
        assert sorted(one.name for one in found) == ["a", "x"]
        for one in found:
            assert one.limits is not None
            assert -one.limits[0] == pytest.approx(one.limits[1] * 128 / 127)

    def test_few_examples_are_said(self, convert):
        parent = convert("float32@onnxruntime")
        artifact = convert("int8@onnxruntime", parent, models.batches(2)[:1])
        assert any("2 examples only" in note for note in artifact.notes)

    @pytest.mark.parametrize(
        ("text", "says"),
        [("float32", "in TF32 where the GPU has it"), ("float32(tf32=False)", "without TF32")],
    )
    def test_tf32_is_stated(self, as_with_cuda, convert, text, says):
        (note,) = convert(f"{text}@onnxruntime").notes
        assert says in note

    @without_cuda
    def test_nothing_is_said_of_tf32_on_the_processor(self, convert):
        assert convert("float32@onnxruntime").notes == ()

    @without_cuda
    def test_library_that_cannot_use_the_gpu(self, as_with_cuda, convert):
        artifact = convert("float32@onnxruntime")
        with pytest.raises(ConversionError, match=r"onnxruntime-gpu\[cuda,cudnn\]"):
            RUNTIME.load(artifact, None)


class TestSession:
    @without_cuda
    def test_a_profiler_of_a_gpu_tells_of_launching_only(self, convert, monkeypatch):
        artifact = convert("float32@onnxruntime")
        batches = models.batches()[:2]
        found = RUNTIME.layers(artifact, batches, None)
        assert found and all(layer.time_ms > 0 for layer in found)
        read = onnxruntime.OnnxRuntimeSession.end_profiling

        def on_cuda(session):
            events = read(session)
            first = next(event for event in events if event.get("cat") == "Node")
            for event in events:
                if event["name"] == first["name"]:
                    event["args"]["provider"] = onnxruntime.CUDA
            return events

        monkeypatch.setattr(onnxruntime.OnnxRuntimeSession, "end_profiling", on_cuda)
        told = RUNTIME.layers(artifact, batches, None)
        assert [layer.name for layer in told] == [layer.name for layer in found]
        assert all(layer.time_ms is None for layer in told)

    @without_cuda
    def test_no_seconds_of_a_device_on_the_processor(self, convert):
        with RUNTIME.load(convert("float32@onnxruntime"), 1) as session:
            assert session.device_seconds({"x": models.EXAMPLES}, 3) is None

    @with_cuda
    @pytest.mark.skipif(cuda.missing() is not None, reason="CUDA's driver cannot be called here")
    def test_seconds_of_the_device(self, convert):
        with RUNTIME.load(convert("float32@onnxruntime"), None) as session:
            inputs = {"x": models.EXAMPLES}
            before = session.run(inputs)["y"]
            seconds = session.device_seconds(inputs, 50)
            assert len(seconds) == 50
            assert all(value > 0 for value in seconds)
            begin = time.perf_counter()
            for _ in range(50):
                after = session.run(inputs)["y"]
            # with copies it takes longer
            assert statistics.median(seconds) < (time.perf_counter() - begin) / 50
            np.testing.assert_array_equal(before, after)
            with pytest.raises(InputError, match="do not fit"):
                session.device_seconds({"z": models.EXAMPLES}, 1)

    @with_cuda
    def test_tf32_can_be_turned_off(self, convert):
        outputs = {}
        for text in ("float32", "float32(tf32=False)"):
            with RUNTIME.load(convert(f"{text}@onnxruntime"), None) as session:
                outputs[text] = session.run({"x": models.EXAMPLES})["y"]
        weights = {name: np.float64(value) for name, value in models.WEIGHTS.items()}
        inner = np.maximum(models.conv(models.EXAMPLES, weights["w"], weights["b"]), 0)
        wanted = inner.reshape(len(inner), -1) @ weights["g"].T + weights["c"]
        assert models.error(outputs["float32(tf32=False)"], wanted) < 1e-6
        assert models.error(outputs["float32"], wanted) < 5e-3
