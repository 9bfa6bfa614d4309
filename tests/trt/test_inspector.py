import json
from pathlib import Path

from tfopt.trt import inspector

# As NVIDIA's documentation of TensorRT 8 prints a layer ("Engine Inspector"), and as TensorRT 10
# names types.
INT8 = json.loads((Path(__file__).parent / "layers" / "8_int8_convolution.json").read_text())


def layer(name, dtype, op="CaskConvolution", output=None):
    return {
        "Name": name,
        "LayerType": op,
        "Inputs": [{"Name": "in", "Dimensions": [1, 8], "Format/Datatype": dtype}],
        "Outputs": [{"Name": "out", "Dimensions": [1, 8], "Format/Datatype": output or dtype}],
    }


def test_types_are_read_as_each_version_writes_them():
    assert inspector.dtype_of(INT8) == "int8"
    spelled = {
        "Channel major FP16 format where channel % 8 == 0": "float16",
        "Row major linear FP32": "float32",
        "Two wide channel vectorized row major FP16 format": "float16",
        "Half": "float16",
        "Float": "float32",
        "BFloat16": "bfloat16",
        "Row major Int8 format": "int8",
        "Row major linear INT32": "int32",
        "N/A due to dynamic shapes": "",
    }
    for text, dtype in spelled.items():
        assert inspector.dtype_of(layer("a", text)) == dtype, text
    assert inspector.dtype_of({"Name": "x"}) == ""


def test_a_layer_computes_in_what_it_takes():
    assert inspector.dtype_of(layer("a", "Int8", output="Float")) == "int8"
    source = {"Outputs": [{"Format/Datatype": "Half"}], "Inputs": []}
    assert inspector.dtype_of(source) == "float16"


def test_the_report_counts_and_names():
    layers = [
        *(layer(f"conv_{n}", "Int8") for n in range(3)),
        layer("softmax", "Float", "CaskSoftMaxV2"),
        *(layer(f"pool_{n}", "Half", "CaskPooling") for n in range(3)),
        layer("reformat", "Float", "Reformat"),
    ]
    assert inspector.report(layers, "int8") == [
        "The engine has 7 layers that compute: 3 in int8, 3 in float16, 1 in float32.",
        "Not in int8 are softmax, pool_0, pool_1 and 1 more.",
    ]
    assert inspector.report(layers, "float32") == [
        "The engine has 7 layers that compute: 3 in int8, 3 in float16, 1 in float32."
    ]
    assert inspector.report([], "int8") == []


def test_an_engine_that_is_float32_without_a_word_is_found():
    plain = [layer("a", "Row major linear FP32"), layer("b", "Float")]
    assert inspector.is_silently_float32(plain, "float16")
    assert inspector.is_silently_float32(plain, "int8")
    assert not inspector.is_silently_float32(plain, "float32")
    assert not inspector.is_silently_float32([*plain, layer("c", "Half")], "float16")
    assert inspector.is_silently_float32([*plain, layer("c", "Half")], "int8")
    assert not inspector.is_silently_float32([], "int8")  # where nobody tells


def test_layers_are_those_of_every_runtime():
    found = inspector.layers([INT8])[0]
    assert (found.op, found.dtype, found.executor) == ("CaskConvolution", "int8", "TensorRT")
    assert found.name.startswith("node_of_gpu_0/res4_0_branch2a_1")
