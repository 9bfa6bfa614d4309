"""What is read from the engine inspector's JSON of real engines; see layers/README.md."""

import json
from pathlib import Path

import pytest

from tfopt.trt import inspector

LAYERS = Path(__file__).parent / "layers"


def read(name):
    """Layers as `build` hands them on: those that tell more than a name."""
    found = json.loads((LAYERS / f"{name}.json").read_text())["Layers"]
    return tuple(layer for layer in found if isinstance(layer, dict))


def layer(kind, *inputs, outputs=("Float",), name="a"):
    """As TensorRT 10 and 11 spell types."""
    ends = [
        [{"Name": "x", "Format/Datatype": dtype} for dtype in side] for side in (inputs, outputs)
    ]
    return {"Name": name, "LayerType": kind, "Inputs": ends[0], "Outputs": ends[1]}


def test_a_layer_computes_in_the_narrowest_type_of_its_inputs():
    assert [inspector.dtype_of(found) for found in read("8_resnet_float16")] == [
        "float32", "float16", "float16",
    ]  # fmt: skip
    assert [inspector.dtype_of(found) for found in read("8_mobilenet_int8")] == [
        "float32", "int8", "int8",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [
        ("Half", "float16"), ("Float", "float32"), ("BFloat16", "bfloat16"), ("Int8", "int8"),
        ("Int64", "int64"), ("Bool", "bool"), ("Row major linear FP32", "float32"),
        ("Two wide channel vectorized row major FP16 format", "float16"),
        ("Row major INT8 format", "int8"), ("N/A due to dynamic shapes", ""),
    ],
)  # fmt: skip
def test_types_are_spelled_in_many_ways(spelling, dtype):
    assert inspector.dtype_of(layer("gemm", spelling, outputs=())) == dtype


def test_a_layer_without_inputs_goes_by_its_outputs():
    assert inspector.dtype_of(layer("Constant", outputs=("Half",))) == "float16"
    assert inspector.dtype_of({"Name": "a"}) == ""


class TestFreeShapes:
    """TensorRT 8.6 tells no types of tensors then, whatever context the inspector has."""

    NO_TYPE = "N/A due to dynamic shapes"

    def convolution(self, weights):
        found = layer("CaskConvolution", self.NO_TYPE, outputs=(self.NO_TYPE,))
        return found | {"Weights": {"Type": weights, "Count": 9408}}

    @pytest.mark.parametrize(
        ("weights", "dtype"),
        [("Int8", "int8"), ("Half", "float16"), ("Float", "float32"), ("new", "")],
    )
    def test_weights_tell(self, weights, dtype):
        assert inspector.dtype_of(self.convolution(weights)) == dtype

    def test_tensors_come_first(self):
        """A product of float32 values with weights that are stored as int8 is one of float32."""
        found = layer("gemm", "Float") | {"Weights": {"Type": "Int8", "Count": 4}}
        assert inspector.dtype_of(found) == "float32"

    @pytest.mark.parametrize("weights", [[], None, {}, {"Type": None}])
    def test_what_is_no_type_tells_nothing(self, weights):
        found = layer("gemm", self.NO_TYPE, outputs=()) | {"Weights": weights}
        assert inspector.dtype_of(found) == ""

    def test_what_is_not_told_is_not_said_to_be_something_else(self):
        untold = layer("PointWise", self.NO_TYPE, outputs=())
        assert inspector.report([self.convolution("Half"), untold, untold], "float16") == [
            "The engine has 3 layers that compute: 2 in an untold type, 1 in float16."
        ]
        counts, others = inspector.report([self.convolution("Float"), untold], "float16")
        assert counts.endswith("1 in float32, 1 in an untold type.")
        assert others == "Not in float16 are a."


def test_long_names_are_cut_in_the_middle():
    """Those of layers that hold many nodes put theirs together."""
    name = " + ".join(f"network/block_{index}/conv/BiasAdd" for index in range(30))
    _, others = inspector.report([layer("gemm", "Float", name=name)], "int8")
    assert others.startswith("Not in int8 are network/block_0/")
    assert others.endswith("/block_29/conv/BiasAdd.")
    assert len(others) < 100


def test_layers_have_names_and_kinds_and_times():
    first, second, _ = inspector.layers(read("8_resnet_float16"), {"Conv_0 + Relu_1": 0.25})
    assert (first.name, first.op, first.time_ms) == (
        "Reformatting CopyNode for Input Tensor 0 to Conv_0 + Relu_1", "Reformat", None,
    )  # fmt: skip
    assert (second.op, second.dtype, second.time_ms) == ("CaskConvolution", "float16", 0.25)
    assert second.executor == "TensorRT"


def test_the_report_counts_what_computes():
    assert inspector.report(read("8_resnet_float16"), "float16") == [
        "The engine has 2 layers that compute: 2 in float16."
    ]
    mixed = [
        *read("8_mobilenet_int8"),
        *(layer("gemm", "Float", name=f"dense_{index}") for index in range(5)),
    ]
    counts, others = inspector.report(mixed, "int8")
    assert counts == "The engine has 7 layers that compute: 5 in float32, 2 in int8."
    assert others == "Not in int8 are dense_0, dense_1, dense_2 and 2 more."
    assert len(inspector.report(mixed, "float32")) == 1


def test_names_alone_say_nothing():
    found = read("8_names_only")
    assert found == ()
    assert inspector.report(found, "int8") == []
    assert not inspector.is_silently_float32(found, "int8")


class TestSilentlyFloat32:
    def test_a_layer_is_enough(self):
        found = [*read("8_resnet_float16"), layer("gemm", "Float")]
        assert not inspector.is_silently_float32(found, "float16")
        assert not inspector.is_silently_float32(found, "float32")
        assert inspector.is_silently_float32(found, "int8")

    def test_copies_do_not_count(self):
        copy, *_ = read("8_resnet_float16")
        back = layer("Reformat", "Half")
        assert inspector.is_silently_float32([copy, back, layer("gemm", "Float")], "float16")

    def test_of_many_operations_in_one_nobody_knows(self):
        """TensorRT 8 makes one layer of a whole transformer, whose ends may be float32."""
        one = layer(
            "Myelin", "Row major linear FP32", name="{ForeignNode[/Constant_7.../Einsum_1]}"
        )
        assert inspector.dtype_of(one) == ""
        assert not inspector.is_silently_float32([one], "float16")
        assert not inspector.is_silently_float32([one, layer("gemm", "Float")], "int8")
        assert inspector.report([one], "float16")[0].endswith("1 in an untold type.")
        assert inspector.dtype_of(layer("Myelin", "Int8")) == "int8"


class TestParse:
    def test_control_characters_of_tensorrt_8(self):
        """Names of nodes that became one layer are put together with them."""
        text = '{"Layers": [{"Name": "a", "Metadata": "[ONNX Layer: a]\x1e[ONNX Layer: b]"}]}'
        with pytest.raises(json.JSONDecodeError, match="control character"):
            json.loads(text)
        found, note = inspector.parse(text)
        assert found == [{"Name": "a", "Metadata": "[ONNX Layer: a]\x1e[ONNX Layer: b]"}]
        assert note == ""

    def test_words_that_are_no_numbers(self):
        text = '{"Layers": [{"Name": "inf, -inf \\"nan", "Beta": -inf, "Alpha": [nan, -nan, 1.5]}]}'
        found, note = inspector.parse(text)
        assert found == [{"Name": 'inf, -inf "nan', "Beta": None, "Alpha": [None, None, 1.5]}]
        assert note == ""

    @pytest.mark.parametrize("name", ["8_resnet_float16", "8_mobilenet_int8", "8_names_only"])
    def test_real_ones_stay_as_they_are(self, name):
        assert inspector.parse((LAYERS / f"{name}.json").read_text()) == (list(read(name)), "")

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"Bindings": []}', "no JSON"])
    def test_what_cannot_be_read_is_said(self, text):
        found, note = inspector.parse(text)
        assert found == []
        assert note.startswith("What TensorRT tells of the engine's layers cannot be read: ")
