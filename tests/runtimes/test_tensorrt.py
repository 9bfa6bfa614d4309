"""What of the runtime tensorrt can be seen without a GPU.

Building an engine is replaced here, nothing else: the ONNX files that TensorRT would get are real,
and ONNX Runtime computes what they say. test_conformance tries the rest where there is a GPU.
"""

import dataclasses
import json
import os
import sys

import numpy as np
import pytest

from tests import goldens
from tfopt import api, commands, cuda, dataset, runtimes, source
from tfopt.artifact import Artifact
from tfopt.errors import ConversionError, InputError
from tfopt.measure import environment
from tfopt.runtimes.base import Conversion
from tfopt.search import candidates, steps
from tfopt.signature import Signature, TensorSpec
from tfopt.trt import bindings, build
from tfopt.trt.profiles import Profile
from tfopt.trt.spec import Built, EngineOptions
from tfopt.trt.target import Record, Target
from tfopt.variant import Variant

RUNTIME = runtimes.get("tensorrt")
without_gpu = pytest.mark.skipif(bool(environment.gpus()), reason="there is a GPU")
H100 = environment.Gpu("NVIDIA H100 80GB HBM3", "580.159.04", (9, 0))
SIGNATURE = Signature("serving_default", (TensorSpec("image", (None, 4, 4, 3), "float32"),), ())


@without_gpu
class TestWithoutGpu:
    def test_the_sentence_says_what_is_missing(self):
        assert RUNTIME.missing().startswith("it needs an NVIDIA GPU, and nvidia-smi finds none")

    @pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
    def test_conversions_are_refused(self, tmp_path, precision):
        with pytest.raises(InputError, match="cannot be made here: it needs an NVIDIA GPU"):
            api.convert(tmp_path, f"{precision}@tensorrt", tmp_path / "out")

    def test_artifacts_from_elsewhere_are_refused(self, tmp_path):
        artifact = Artifact(
            tmp_path, Variant.parse("int8@tensorrt"), None, "0" * 64, SIGNATURE, 1, 1, {}
        )
        artifact.save()
        with pytest.raises(InputError, match="needs tensorrt: it needs an NVIDIA GPU"):
            runtimes.load(artifact)
        with pytest.raises(InputError, match="cannot be built here: it needs an NVIDIA GPU"):
            api.rebuild(tmp_path, tmp_path / "new")

    def test_runtimes_say_it(self, capsys):
        assert commands.main(["runtimes"]) == 0
        assert "tensorrt: not available, it needs an NVIDIA GPU" in capsys.readouterr().out

    def test_a_search_leaves_it_out_unless_asked(self):
        plan = candidates.plan("onnx")
        assert "tensorrt" not in {variant.runtime for variant in plan.variants}
        asked = candidates.plan("onnx", ["*@tensorrt"])
        assert {v.precision for v in asked.skipped} == {"float32", "float16", "int8"}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as nvidia-smi would tell."""
    monkeypatch.setattr(environment, "gpus", lambda: (H100,))


class TestMissing:
    @pytest.fixture(autouse=True)
    def fresh(self, gpu):
        bindings.missing.cache_clear()
        yield
        bindings.missing.cache_clear()

    @pytest.mark.skipif("tensorrt" in sys.modules, reason="TensorRT is installed")
    def test_the_package_is_named(self):
        pytest.importorskip("cuda")
        try:
            import tensorrt  # noqa: F401
        except ModuleNotFoundError:
            assert "package tensorrt is not installed; pip install tensorrt-cu12" in (
                RUNTIME.missing()
            )

    def test_a_library_that_cannot_be_loaded_is_named(self, tmp_path, monkeypatch):
        (tmp_path / "tensorrt.py").write_text(
            'raise ImportError("libnvinfer.so.10: cannot open shared object file")\n'
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        reason = RUNTIME.missing()
        assert "TensorRT's libraries cannot be loaded (libnvinfer.so.10: cannot open" in reason
        assert "pip install tensorrt-cu12-libs" in reason


def test_what_cuda_says_without_a_driver():
    if environment.gpus():
        assert cuda.missing() is None
        return
    assert "cuda" in cuda.missing().lower()


class TestOptions:
    @pytest.mark.parametrize(
        ("option", "expected"),
        [
            ("builder=cmake", "builder is one of any, python, trtexec, onnxruntime"),
            ("workspace_mib=0", "workspace_mib is a whole number of at least 1"),
            ("calibration=entropy", "Unknown option 'calibration'"),
        ],
    )
    def test_wrong_values_say_what_is_right(self, option, expected):
        with pytest.raises(InputError, match=expected):
            runtimes.expand([f"float16({option})@tensorrt"])

    def test_names_parse_back(self):
        text = "int8(builder=trtexec,calibration=entropy,shapes=dynamic)@tensorrt"
        assert [str(variant) for variant in runtimes.expand([text])] == [text]


@dataclasses.dataclass
class Seen:
    """What the builder was asked for."""

    spec: object = None
    file: object = None
    count: int = 0


@pytest.fixture
def seen(gpu, monkeypatch, tmp_path):
    """A builder that keeps what it is asked for and writes an empty engine."""
    found = Seen()

    def fake(onnx_file, engine_file, spec):
        found.spec, found.file, found.count = spec, onnx_file, found.count + 1
        engine_file.write_bytes(b"engine")
        layers = ({"Name": "a", "LayerType": "Conv", "Inputs": [{"Format/Datatype": found.told}]},)
        return Built("tensorrt 10.13.3", 57.0, layers, {"device_memory_bytes": 2.0**20}, ())

    found.told = "Half"
    monkeypatch.setattr(build, "build", fake)
    monkeypatch.setattr(bindings, "missing", lambda: None)
    monkeypatch.setattr(build, "needs_strong_typing", lambda: False)
    monkeypatch.setattr("tfopt.runtimes.tensorrt._libraries", lambda _: {"TensorRT": "10.13.3"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return found


class Made:
    """Conversions of one golden."""

    def __init__(self, folder, name="conv", num_calibration=64):
        golden = goldens.GOLDENS[name]
        goldens.export(golden, folder / "model")
        self.folder = folder
        self.source = source.prepare(folder / "model", folder / "source")
        self.data = dataset.write(
            golden.examples(64, 0), self.source.signature, folder / "data",
            num_calibration=num_calibration,
        )  # fmt: skip
        self.count = 0

    def convert(self, text, engine=None):
        self.count += 1
        out = self.folder / f"out_{self.count}"
        out.mkdir()
        conversion = Conversion(
            self.source, out, None, 4,
            dataset.calibration_batches(self.data, self.source.signature, 4), [],
            self.source.signature, self.data.num_calibration, engine or EngineOptions(),
            lambda: dataset.batch_shapes(self.data, self.source.signature, 4),
        )  # fmt: skip
        RUNTIME.convert(Variant.parse(f"{text}@tensorrt"), conversion)
        return conversion

    def outputs(self, file):
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        inputs, _, _ = next(self.data.evaluation.batches(self.source.signature, 4))
        return session.run(None, inputs)[0]


@pytest.fixture(scope="module")
def conv(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("conv"))


def distance(one, other):
    return np.linalg.norm(one - other) / np.linalg.norm(other - other.mean())


class TestConversion:
    def test_float32_is_the_file_of_onnx_runtime_for_one_shape(self, seen, conv):
        made = conv.convert("float32(tf32=False)")
        assert not seen.spec.tf32
        assert seen.spec.profile.is_fixed
        assert made.signature.batch_size == 4
        assert "without TF32" in made.notes[-1]
        record = Record.open(made.folder)
        assert record.target.gpu == H100.name
        assert record.details["spec"]["tf32"] is False

    def test_float16_is_asked_for_where_there_is_a_flag(self, seen, conv):
        made = conv.convert("float16")
        assert (seen.spec.precision, seen.spec.is_strongly_typed) == ("float16", False)
        plain = conv.convert("float32")
        assert distance(conv.outputs(made.folder / "model.onnx"),
                        conv.outputs(plain.folder / "model.onnx")) == 0  # fmt: skip

    def test_float16_is_in_the_file_where_there_is_none(self, seen, conv, monkeypatch):
        plain = conv.convert("float32")
        monkeypatch.setattr(build, "needs_strong_typing", lambda: True)
        made = conv.convert("float16")
        assert seen.spec.is_strongly_typed
        error = distance(
            conv.outputs(made.folder / "model.onnx"), conv.outputs(plain.folder / "model.onnx")
        )
        assert 0 < error < 5e-3
        size = (made.folder / "model.onnx").stat().st_size
        assert size < 0.8 * (plain.folder / "model.onnx").stat().st_size

    @pytest.mark.parametrize("is_typed", [False, True])
    def test_int8_is_symmetric_pairs_in_every_version(self, seen, conv, monkeypatch, is_typed):
        import onnx
        from onnx import numpy_helper

        plain = conv.convert("float32")
        monkeypatch.setattr(build, "needs_strong_typing", lambda: is_typed)
        seen.told = "Int8"
        made = conv.convert("int8")
        assert seen.spec.is_strongly_typed == is_typed
        graph = onnx.load(made.folder / "model.onnx").graph
        constants = {c.name: numpy_helper.to_array(c) for c in graph.initializer}
        pairs = [node for node in graph.node if node.op_type == "QuantizeLinear"]
        assert pairs
        for node in pairs:
            if len(node.input) > 2:
                zero = constants[node.input[2]]
                assert zero.dtype == np.int8
                assert not zero.any()
        error = distance(
            conv.outputs(made.folder / "model.onnx"), conv.outputs(plain.folder / "model.onnx")
        )
        assert 1e-4 < error < 0.35

    def test_operators_are_those_that_tensorrt_8_knows(self, seen, monkeypatch, tmp_path):
        import onnx

        from tests.onnx import models

        file = tmp_path / "reduce.onnx"
        reduce = onnx.helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=0)
        onnx.save(models.make([reduce], {"axes": np.int64([2, 3])}, ["n", 3, 6, 6], ["n", 3]), file)
        prepared = source.prepare(file, tmp_path / "source")
        for library, opset in (("10.13.3", 18), ("8.6.1", 17)):
            found = {"TensorRT": library}
            monkeypatch.setattr("tfopt.runtimes.tensorrt._libraries", lambda _, f=found: f)
            made = steps.convert(
                prepared, Variant.parse("float32@tensorrt"), tmp_path / library, None, None, 8
            )
            model = onnx.load(made.folder / "model.onnx")
            assert model.opset_import[0].version == opset
            x = models.EXAMPLES[:8]
            np.testing.assert_allclose(models.run(model, x), x.mean((2, 3)), atol=1e-6)

    def test_layers_that_are_named_stay_float32(self, seen, conv, monkeypatch):
        import onnx

        version = {"TensorRT": "8.6.1"}
        monkeypatch.setattr("tfopt.runtimes.tensorrt._libraries", lambda _: version)
        nodes = onnx.load(conv.convert("float32").folder / "model.onnx").graph.node
        name = next(node.name for node in nodes if node.op_type == "Conv")
        conv.convert("float16", EngineOptions(float32_layers=(name,)))
        assert name in seen.spec.float32_layers
        assert not seen.spec.is_strongly_typed
        made = conv.convert("float16", EngineOptions(float32_layers=("*",)))
        computing = [node.name for node in nodes if node.op_type not in ("Shape", "Cast")]
        assert set(seen.spec.float32_layers) <= set(computing)
        assert name in seen.spec.float32_layers
        assert any(note.startswith("Kept in float32: ") for note in made.notes)

    def test_from_tensorrt_10_on_the_file_says_what_stays_float32(self, seen, conv):
        """10.0 does not obey what layers are told (NVIDIA/TensorRT, issue 3941)."""
        import onnx

        nodes = onnx.load(conv.convert("float32").folder / "model.onnx").graph.node
        name = next(node.name for node in nodes if node.op_type == "Conv")
        made = conv.convert("float16", EngineOptions(float32_layers=(name,)))
        assert seen.spec.is_strongly_typed
        assert not seen.spec.float32_layers
        model = onnx.load(made.folder / "model.onnx")
        weights = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        types = {
            node.name: weights[node.input[1]]
            for node in model.graph.node
            if node.op_type == "Conv" and node.input[1] in weights
        }
        assert types.pop(name) == onnx.TensorProto.FLOAT
        assert set(types.values()) <= {onnx.TensorProto.FLOAT16}
        conv.convert("float16")
        assert not seen.spec.is_strongly_typed  # where nothing stays, TensorRT chooses

    def test_layers_that_compute_no_floats_have_no_precision(self, tmp_path):
        """`TopK` gives integers, too, which trtexec would want to be float32 with the values."""
        import onnx

        from tests.onnx import models
        from tfopt.onnx import half

        nodes = [
            onnx.helper.make_node("MatMul", ["x", "w"], ["a"], name="product"),
            onnx.helper.make_node("TopK", ["a", "k"], ["values", "indices"], name="best"),
            onnx.helper.make_node("Shape", ["a"], ["shape"], name="shape"),
            onnx.helper.make_node("Cast", ["indices"], ["b"], name="cast", to=1),
            onnx.helper.make_node("Add", ["values", "b"], ["y"], name="sum"),
        ]
        weights = {"w": models.random(6, 6), "k": np.int64([2])}
        onnx.save(models.make(nodes, weights, ["n", 6], ["n", 2]), tmp_path / "model.onnx")
        names = [node.name for node in nodes]
        assert half.of_floats(tmp_path / "model.onnx", names) == ["product", "sum"]

    def test_functions_of_the_file_are_put_in_their_place(self, seen, tmp_path):
        import onnx
        from onnx import helper

        from tests.onnx import models
        from tfopt.onnx import opset

        call = helper.make_node("MyRelu", ["x"], ["y"], domain="local")
        model = models.make([call], {}, ["n", 3, 6, 6], ["n", 3, 6, 6])
        model.functions.append(
            helper.make_function(
                "local", "MyRelu", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])],
                [helper.make_opsetid("", model.opset_import[0].version - 1)],
            )
        )  # fmt: skip
        model.opset_import.append(helper.make_opsetid("local", 1))
        onnx.save(model, tmp_path / "function.onnx")
        prepared = source.prepare(tmp_path / "function.onnx", tmp_path / "source")
        made = steps.convert(
            prepared, Variant.parse("float32@tensorrt"), tmp_path / "out", None, None, 8
        )
        found = onnx.load(made.folder / "model.onnx")
        assert [node.op_type for node in found.graph.node] == ["Relu"]
        assert not found.functions
        lowered = opset.lower_opset(model, 17)  # of which ONNX's converter drops functions
        assert [node.op_type for node in lowered.graph.node] == ["Relu"]

    def test_weights_beyond_what_a_file_holds_are_refused(self, conv, monkeypatch, tmp_path):
        import onnx

        from tests.onnx import models
        from tfopt.runtimes import tensorrt

        product = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
        model = models.make([product], {"w": models.random(64, 64)}, ["n", 64], ["n", 64])
        file = tmp_path / "model.onnx"
        onnx.save(model, file, save_as_external_data=True, location="weights", size_threshold=0)
        monkeypatch.setattr(tensorrt, "MAX_FILE_BYTES", 10_000)
        with pytest.raises(ConversionError, match=r"has 16,384 bytes of weights beside it"):
            tensorrt._take_in_weights(file)
        monkeypatch.setattr(tensorrt, "MAX_FILE_BYTES", 20_000)
        tensorrt._take_in_weights(file)
        assert not (tmp_path / "weights").exists()

    def test_a_pattern_without_a_match_lists_layers(self, seen, conv):
        with pytest.raises(InputError, match=r"No layer matches 'nothing\*'.*the layers are "):
            conv.convert("float16", EngineOptions(float32_layers=("nothing*",)))

    def test_dynamic_shapes_and_given_ones(self, seen, conv):
        conv.convert("float16(shapes=dynamic)")
        name = conv.source.signature.input_names[0]
        assert seen.spec.profile.inputs[name].maximum[0] == 32
        shape = "x".join(map(str, conv.source.signature.inputs[0].shape[1:]))
        given = Profile.parse(*(f"{name}:{n}x{shape}" for n in (2, 4, 9)))
        made = conv.convert("float16", EngineOptions(given))
        assert seen.spec.profile == given
        assert made.signature.batch_size is None
        excluding = Profile.parse(*(f"{name}:{n}x{shape}" for n in (5, 6, 9)))
        with pytest.raises(InputError, match="The profile excludes the data"):
            conv.convert("float16", EngineOptions(excluding))

    def test_an_engine_that_is_float32_without_a_word_is_refused(self, seen, conv):
        seen.told = "Float"
        with pytest.raises(ConversionError, match="in which nothing is float16"):
            conv.convert("float16(workspace_mib=3)")
        assert seen.spec.workspace_bytes == 3 << 20

    def test_the_same_engine_is_built_once(self, seen, conv):
        first = conv.convert("float16(workspace_mib=77)")
        count = seen.count
        again = conv.convert("float16(workspace_mib=77)")
        assert seen.count == count
        assert again.notes[-1] == "The engine was taken from the cache of an earlier build."
        assert (again.folder / "model.engine").read_bytes() == b"engine"
        other = EngineOptions(cache_folder=conv.folder / "elsewhere")
        conv.convert("float16(workspace_mib=77)", other)
        assert seen.count == count + 1
        assert first.notes[0].startswith("Built with tensorrt 10.13.3 in 57 s for image:4x")

    def test_few_examples_are_refused(self, seen, tmp_path):
        made = Made(tmp_path, num_calibration=5)
        with pytest.raises(ConversionError, match="calibrated on 5 examples and needs at least 8"):
            made.convert("int8")

    def test_a_builder_that_is_not_there_is_refused(self, seen, conv, monkeypatch):
        monkeypatch.setenv("PATH", os.fspath(conv.folder))
        with pytest.raises(ConversionError, match="builder=trtexec cannot be used here: "):
            conv.convert("float16(builder=trtexec)")

    def test_it_is_built_anew_from_what_the_artifact_holds(self, seen, conv, tmp_path, monkeypatch):
        seen.told = "Int8"
        made = conv.convert("int8(workspace_mib=5)")
        asked = dataclasses.replace(seen.spec, timing_cache=None)
        artifact = Artifact(
            made.folder, Variant.parse("int8@tensorrt"), None, "0" * 64, made.signature, 1, 1, {}
        )
        other = dataclasses.replace(H100, name="Tesla T4")
        monkeypatch.setattr(environment, "gpus", lambda: (other,))
        with pytest.raises(InputError, match=r"need a NVIDIA H100 80GB HBM3 \(here: Tesla T4\)"):
            RUNTIME.load(artifact, None)
        lasting = "Kept in float32: a."
        dataclasses.replace(artifact, notes=(lasting, *made.notes)).save()
        rebuilt = steps.rebuild(artifact.folder, tmp_path / "new")
        assert rebuilt.notes[0] == lasting
        assert not any(H100.name in note for note in rebuilt.notes)
        notes = rebuilt.notes
        assert dataclasses.replace(seen.spec, timing_cache=None) == asked
        assert Record.open(tmp_path / "new").target == Target.here({"TensorRT": "10.13.3"})
        assert any("Tesla T4" in note for note in notes)
        before = (made.folder / "model.onnx").read_bytes()
        assert (tmp_path / "new" / "model.onnx").read_bytes() == before
        layers = RUNTIME.layers(artifact, [], None)
        assert [layer.dtype for layer in layers] == ["int8"]
        assert json.loads((tmp_path / "new" / "layers.json").read_text())
