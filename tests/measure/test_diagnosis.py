import json
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tfopt
from tests import goldens
from tfopt import dataset, runtimes, source
from tfopt.measure import diagnosis
from tfopt.measure.diagnosis import Diagnosis, Survey
from tfopt.runtimes.base import Activation, Layer
from tfopt.search import steps
from tfopt.variant import Variant

RUNTIMES = ("litert", "onnxruntime", "openvino")
QUANTIZED = tuple(f"int8@{runtime}" for runtime in RUNTIMES)
TENSORFLOW = (
    "float32@tensorflow",
    "float32(frozen=True)@tensorflow",
    "float32(xla=True)@tensorflow",
)


def layers(*ops, dtype="int8", **options):
    return [Layer(f"{op} {index}", op, dtype, **options) for index, op in enumerate(ops)]


def describe(found, precision="int8", num_ports=2):
    return " ".join(diagnosis.describe_layers(found, precision, num_ports))


class TestLayers:
    def test_nothing_to_see(self):
        assert describe([]) == ""
        assert describe(layers("Conv", "Gemm")) == ""

    def test_where_the_time_goes(self):
        found = [*layers("Conv", "Conv", time_ms=3.0), *layers("Gemm", time_ms=2.0)]
        assert describe(found) == "Most of the time goes into 75% Conv and 25% Gemm."

    def test_float_layers(self):
        found = [*layers("Conv", "Conv"), *layers("Softmax", dtype="float32")]
        assert describe(found) == "1 of 3 operations computes in float32: 1 × Softmax."
        assert describe(found, "float32") == ""
        found = layers("Conv", "Conv", "Gemm", "Add", "Mul", dtype="float32")
        assert describe(found, "float16") == (
            "All operations (5) compute in float32: 2 × Conv, 1 × Gemm, 1 × Add and 1 more."
        )

    def test_shares_are_of_the_time(self):
        found = [
            *layers("Conv", time_ms=8.0),
            *layers("Softmax", dtype="float32", time_ms=2.0),
        ]
        assert "1 of 2 operations computes in float32 (20% of the time)" in describe(found)

    @pytest.mark.parametrize("pair", [("QUANTIZE", "DEQUANTIZE"), ("QuantizeLinear",) * 2])
    def test_quantizations_beyond_those_of_inputs_and_outputs(self, pair):
        assert describe(layers("Conv", *pair)) == ""
        assert describe(layers("Conv", *pair, *pair)).startswith(
            "4 quantizations and dequantizations are left; inputs and outputs need 2 at most"
        )

    def test_casts_and_transposes(self):
        text = describe(layers("Cast", "Conv", "Transpose", "ReorderInput"))
        assert "1 cast between dtypes is executed." in text
        assert "2 transposes and reorderings of layouts are executed." in text

    def test_what_is_not_delegated(self):
        own = layers("SOFTMAX", "MEAN", executor="own kernels", is_fallback=True)
        assert describe([*layers("CONV_2D", executor="XNNPACK"), *own]) == (
            "XNNPACK computes 1 of 3 operations; 1 × SOFTMAX, 1 × MEAN run in own kernels."
        )
        assert describe(own) == "No operation is delegated: own kernels compute all 2."

    def test_select_ops(self):
        assert "1 × FlexErf runs in TensorFlow inside LiteRT" in describe(layers("FlexErf"))


class TestDiagnosis:
    FOUND = Diagnosis(
        ("One.", "Two."),
        (Layer("a", "Conv", "int8", 1.0), Layer("b", "Gemm", "int8", 3.0), Layer("c", "Add", "")),
    )

    def test_saved_and_opened(self, tmp_path):
        self.FOUND.save(tmp_path / "new" / "found.json")
        assert Diagnosis.open(tmp_path / "new" / "found.json") == self.FOUND

    def test_slowest(self):
        assert [(found["name"], found["share"]) for found in self.FOUND.slowest(5)] == [
            ("b", 0.75),
            ("a", 0.25),
        ]
        assert [found["name"] for found in self.FOUND.slowest(1)] == ["b"]
        assert Diagnosis((), tuple(layers("Conv"))).slowest(5) == []

    def test_table(self):
        assert self.FOUND.table.name.tolist() == ["a", "b", "c"]
        assert self.FOUND.table.time_ms.isna().tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("conv/Relu", "conv/Relu"),
        ("model/block/conv/Relu:0", "conv/Relu"),
        ("StatefulPartitionedCall_1/StatefulPartitionedCall/m/dense/BiasAdd", "dense/BiasAdd"),
        ("PartitionedCall/m/conv/Relu;PartitionedCall/m/conv/BiasAdd", "conv/Relu"),
        ("StatefulPartitionedCall", "StatefulPartitionedCall"),
        ("Conv__21_token_4", "Conv__21_token_4"),
        ("", ""),
    ],
)
def test_short_names(name, short):
    assert diagnosis.short_name(name) == short


values = st.lists(st.floats(-5, 5, width=32), min_size=12, max_size=12)


class TestSurvey:
    @given(st.lists(values, min_size=1, max_size=4), st.sampled_from([1, -1]))
    def test_is_that_of_all_batches_together(self, batches, axis):
        arrays = [np.array(batch, np.float32).reshape(2, 2, 3) for batch in batches]
        survey = Survey(limits=(-1.0, 2.0))
        for array in arrays:
            survey.add(Activation("a", array, None, axis))
        every = np.concatenate(arrays)
        step = 3 / 255
        assert survey.num_values == every.size
        assert survey.num_cut_off == np.sum((every < -1 - step) | (every > 2 + step))
        others = tuple({0, 1, 2} - {axis % 3})
        np.testing.assert_array_equal(survey.lowest, every.min(axis=others))
        np.testing.assert_array_equal(survey.is_constant, np.ptp(every, axis=others) == 0)

    def test_without_limits_or_channels(self):
        survey = Survey()
        survey.add(Activation("a", np.full((4, 3), 9, np.float32), None, None))
        assert (survey.num_values, survey.num_cut_off) == (12, 0)
        assert survey.is_constant.size == 0


def split(examples):
    """Data of which these are both the calibration and the evaluation examples."""
    return {"x_train": examples, "x_test": examples}


def convert(folder, variants, examples):
    """As `tfopt.convert`, in this process."""
    prepared = source.prepare(folder / "model", folder / f"source of {variants[0]}")
    data = dataset.write(split(examples), prepared.signature, folder / f"data for {variants[0]}")
    for name in variants:
        variant = Variant.parse(name)
        parent = runtimes.get(variant.runtime).parent(variant)
        parent_folder = None if parent is None else folder / str(parent)
        steps.convert(prepared, variant, folder / name, parent_folder, data, 1)


@pytest.fixture(scope="module")
def gates(tmp_path_factory):
    """A network of four gates, and artifacts of it: what happens inside is known.

    Hidden unit i is relu(w_i x_i + b_i): 0 and 1 pass their input on, 2 makes it so small that
    int8 has no step for it, and 3 is always closed.
    """
    import keras

    folder = tmp_path_factory.mktemp("gates")
    model = keras.Sequential(
        [
            keras.Input((4,), name="x"),
            keras.layers.Dense(4, activation="relu", name="gates"),
            keras.layers.Dense(3, name="answer"),
        ]
    )
    kernel = np.diag([1, 1, 1e-4, 1]).astype(np.float32)
    random = np.random.default_rng(0)
    model.set_weights(
        [kernel, np.array([0, 0, 0, -9], np.float32),
         random.normal(size=(4, 3)).astype(np.float32), np.zeros(3, np.float32)]
    )  # fmt: skip
    model.export(str(folder / "model"), verbose=False)
    calibration = random.uniform(0, 1, (64, 4)).astype(np.float32)
    calibration[:, :2].flat[0] = 1  # the whole range is seen
    convert(folder, [f"float32@{runtime}" for runtime in RUNTIMES], calibration)
    convert(folder, [*QUANTIZED, "int16x8@litert", *TENSORFLOW], calibration)
    # In the examples all that passes gate 0 is above what was calibrated.
    examples = calibration.copy()
    examples[:, 0] = 2
    return folder, calibration, examples


def diagnose(gates, variant, examples, has_reference=True):
    """As `tfopt.diagnose`, in this process."""
    folder, *_ = gates
    reference = folder / f"float32@{variant.partition('@')[2]}" if has_reference else None
    signature = tfopt.Artifact.open(folder / variant).signature
    with tempfile.TemporaryDirectory() as name:
        data = dataset.write(split(examples), signature, Path(name, "data"))
        return steps.diagnose(
            folder / variant, data, batch_size=1, num_threads=1, reference_folder=reference
        )


@pytest.mark.parametrize("variant", ["int8@litert", "int8@onnxruntime", "int16x8@litert"])
def test_values_that_quantization_cuts_off(gates, variant):
    """Unit 0 is 2 where 1 is the end of the range: a quarter of the four units."""
    assert cut_off(diagnose(gates, variant, gates[2])) == [25]
    assert cut_off(diagnose(gates, variant, gates[1])) == []
    assert cut_off(diagnose(gates, variant, gates[2], has_reference=False)) == []


def test_ranges_of_the_average_example_cut_off_more(gates):
    """NNCF averages the highest value of each example."""
    (before,) = cut_off(diagnose(gates, "int8@openvino", gates[1]))
    (after,) = cut_off(diagnose(gates, "int8@openvino", gates[2]))
    assert 0 < before < 25 <= after < 50


def cut_off(found):
    """The percentages of values that are cut off."""
    text = " ".join(found.sentences)
    return [float(share) for share in re.findall(r"([\d.]+)% of the values of \S+ lie", text)]


@pytest.mark.parametrize("variant", QUANTIZED)
def test_channels_that_quantization_kills(gates, variant):
    text = " ".join(diagnose(gates, variant, gates[1]).sentences)
    assert "Dead by quantization: 1 of 4 channels of" in text
    assert "Dead in the model" not in text


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_channels_that_are_dead_already(gates, runtime):
    text = " ".join(diagnose(gates, f"float32@{runtime}", gates[1]).sentences)
    assert "Dead in the model itself: 1 of 4 channels of" in text
    assert "Dead by quantization" not in text


class TestRuntimes:
    def test_litert_says_who_computes(self, gates):
        found = diagnose(gates, "float32@litert", gates[1]).layers
        assert {layer.executor for layer in found} == {"XNNPACK"}
        assert all(layer.time_ms is None for layer in found)
        assert [layer.op for layer in found] == ["FULLY_CONNECTED"] * 2
        sentences = diagnose(gates, "int16x8@litert", gates[1]).sentences
        assert any(text.startswith("No operation is delegated") for text in sentences)

    @pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
    def test_profilers_tell_times(self, gates, runtime):
        found = diagnose(gates, f"float32@{runtime}", gates[1])
        assert found.layers
        assert all(layer.time_ms >= 0 for layer in found.layers)
        assert len({layer.name for layer in found.layers}) == len(found.layers)
        if any(layer.time_ms for layer in found.layers):  # OpenVINO counts whole microseconds
            assert sum(layer["share"] for layer in found.slowest(99)) == pytest.approx(1)
            assert found.sentences[0].startswith("Most of the time goes into")
        else:
            assert runtime == "openvino"
        assert "float32" in {layer.dtype for layer in found.layers}

    @pytest.mark.parametrize("variant", TENSORFLOW)
    def test_tensorflow_traces(self, gates, variant):
        found = diagnose(gates, variant, gates[1], has_reference=False).layers
        assert bool(found) == ("xla" not in variant)
        if found:
            products = [layer for layer in found if layer.op in ("MatMul", "FusedMatMul")]
            assert len(products) == 2
            assert all(layer.dtype == "float32" and layer.time_ms > 0 for layer in products)

    def test_steps_of_a_loop_are_one_layer(self, tmp_path):
        golden = goldens.GOLDENS["lstm"]
        goldens.export(golden, tmp_path / "model")
        examples = next(iter(golden.examples(16, 0).values()))
        convert(tmp_path, ["float32@tensorflow"], examples)
        found = diagnose((tmp_path,), "float32@tensorflow", examples, has_reference=False).layers
        assert found
        assert len({layer.name for layer in found}) == len(found)


def test_in_a_process_of_its_own(gates):
    folder, calibration, _ = gates
    found = tfopt.diagnose(
        folder / "int8@litert", split(calibration), folder / "float32@litert", num_threads=1
    )
    assert found == diagnose(gates, "int8@litert", calibration)


def test_too_few_examples_call_nothing_dead(gates):
    found = diagnose(gates, "float32@litert", gates[1][:3])
    assert not any("Dead" in text for text in found.sentences)
    assert found.layers


def test_layers_are_told_when_the_values_cannot_be_seen(gates, monkeypatch):
    def fail(self, artifact, batches):
        raise ValueError("two tensors of one name")

    monkeypatch.setattr(type(runtimes.get("onnxruntime")), "activations", fail)
    found = diagnose(gates, "float32@onnxruntime", gates[1])
    assert found.sentences[-1] == "The values inside could not be seen: two tensors of one name"
    assert found.layers


def test_positions_of_attention_are_no_channels():
    """A mask makes scores constant at padded positions; nothing of the model is dead there."""
    import onnx
    from onnx import TensorProto, helper

    from tfopt.onnx.tensors import floats_inside

    nodes = [
        helper.make_node("MatMul", ["x", "weights"], ["hidden"]),
        helper.make_node("Transpose", ["hidden"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["hidden", "turned"], ["scores"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("Relu", ["scores"], ["masked"]),
    ]
    shape = [1, 4, 4]
    graph = helper.make_graph(
        nodes, "attention",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("active", "masked")],
        [helper.make_tensor("weights", TensorProto.FLOAT, [4, 4], np.eye(4).ravel())],
    )  # fmt: skip
    found = floats_inside(onnx.shape_inference.infer_shapes(helper.make_model(graph)))
    assert {tensor.name: tensor.channel_axis for tensor in found} == {
        "hidden": -1, "turned": None, "scores": None, "active": -1, "masked": None,
    }  # fmt: skip


class TestMistakes:
    @pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"num_threads": -1}])
    def test_counts(self, gates, wrong):
        folder, calibration, _ = gates
        with pytest.raises(tfopt.InputError, match=r"is (0|-1); expected a whole number"):
            tfopt.diagnose(folder / "int8@litert", {"x": calibration}, **wrong)

    def test_runtime_that_is_not_installed(self, gates, monkeypatch):
        folder, calibration, _ = gates
        monkeypatch.setattr(
            type(runtimes.get("openvino")), "missing", lambda self: "pip install it."
        )
        with pytest.raises(tfopt.InputError, match="cannot be run here: pip install it"):
            tfopt.diagnose(folder / "int8@openvino", {"x": calibration})

    def test_reference_of_another_signature(self, gates, tmp_path):
        folder, calibration, _ = gates
        shutil.copytree(folder / "float32@litert", tmp_path / "other")
        file = tmp_path / "other" / "artifact.json"
        file.write_text(file.read_text().replace('"output_0"', '"embedding"'))
        with pytest.raises(tfopt.InputError, match=r"The reference has .*embedding.*; expected"):
            tfopt.diagnose(folder / "int8@litert", {"x": calibration}, tmp_path / "other")

    @pytest.mark.parametrize("wrong", ["float32@onnxruntime", "int8@litert"])
    def test_reference_of_another_kind(self, gates, wrong):
        folder, calibration, _ = gates
        with pytest.raises(tfopt.InputError, match=r"The reference is .*; expected float32@litert"):
            tfopt.diagnose(folder / "int8@litert", {"x": calibration}, folder / wrong)

    def test_reference_of_another_model(self, gates, tmp_path):
        folder, calibration, _ = gates
        shutil.copytree(folder / "float32@litert", tmp_path / "other")
        file = tmp_path / "other" / "artifact.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "source_sha256": "f" * 64}))
        with pytest.raises(tfopt.InputError, match="of ffffffffffff; expected"):
            tfopt.diagnose(folder / "int8@litert", {"x": calibration}, tmp_path / "other")

    def test_artifact_that_does_not_run(self, gates, tmp_path):
        folder, calibration, _ = gates
        shutil.copytree(folder / "int8@onnxruntime", tmp_path / "broken")
        (tmp_path / "broken" / "model.onnx").write_bytes(b"no model")
        with pytest.raises(tfopt.ResultError, match="cannot be looked into"):
            tfopt.diagnose(tmp_path / "broken", {"x": calibration})
