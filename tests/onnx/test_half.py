import numpy as np
import onnx
import pytest
from onnx import helper

from tests.onnx import models
from tfopt.errors import InputError
from tfopt.onnx import half, quantize

node = helper.make_node


def chain(scale=1000.0):
    """Two products: 4 times `scale` in between."""
    eye = np.eye(4, dtype=np.float32)
    return models.make(
        [
            node("MatMul", ["x", "up"], ["a"], name="up"),
            node("Relu", ["a"], ["b"], name="relu"),
            node("MatMul", ["b", "down"], ["y"], name="down"),
        ],
        {"up": eye * np.float32(scale), "down": eye / np.float32(scale)},
        ["n", 4],
        ["n", 4],
    )


@pytest.fixture
def to_int8(tmp_path):
    def convert(model, **options):
        onnx.save_model(model, tmp_path / "model.onnx")
        settings = {"calibration": "minmax", "per_channel": True, "is_symmetric": True, **options}
        file = tmp_path / "int8.onnx"
        quantize.to_int8(tmp_path / "model.onnx", file, models.batches(), **settings)
        return onnx.load(file)

    return convert


class TestToFloat16:
    def test_inputs_and_outputs_keep_their_types(self):
        model = models.conv_relu_gemm()
        before = model.SerializeToString()
        found = half.to_float16(model)
        onnx.checker.check_model(found, full_check=True)
        assert model.SerializeToString() == before
        types = models.dtypes(found)
        assert types["x"] == types["y"] == "float32"
        assert {types[name] for name in (*models.WEIGHTS, "conv", "relu", "flat")} == {"float16"}
        outputs = models.run(found, models.EXAMPLES)
        wanted = models.run(model, models.EXAMPLES)
        assert outputs.dtype == np.float32
        assert 1e-6 < models.error(outputs, wanted) < 1e-3

    def test_named_nodes_stay_float32(self):
        found = half.to_float16(models.conv_relu_gemm(), ["conv", "relu"])
        onnx.checker.check_model(found, full_check=True)
        types = models.dtypes(found)
        assert {types[name] for name in "wb"} == {"float32"}
        assert {types[name] for name in "gc"} == {"float16"}
        values = models.run(found, models.EXAMPLES)
        assert models.error(values, models.run(models.conv_relu_gemm(), models.EXAMPLES)) < 1e-3

    def test_float32_goes_from_one_node_to_the_next(self):
        """Through float16 the large values between would be infinite."""
        x = np.full((2, 4), 100, np.float32)
        found = half.to_float16(chain(), ["up", "relu", "down"])
        np.testing.assert_allclose(models.run(found, x), x, rtol=1e-6)
        found = half.to_float16(chain(), ["up", "down"])  # but not where one computes in float16
        assert not np.isfinite(models.run(found, x)).all()

    def test_unknown_node(self):
        with pytest.raises(InputError, match=r"no node 'dense'"):
            half.to_float16(models.conv_relu_gemm(), ["conv", "dense"])

    @pytest.mark.parametrize("opset", [11, 12])
    def test_model_like_those_of_torch(self, opset):
        model = models.like_torch(opset)
        found = half.to_float16(model)
        onnx.checker.check_model(found)
        assert {value.name for value in found.graph.input} == {"x"}
        assert {value.dtype.name for value in models.arrays(found).values()} == {"float16"}
        wanted = models.run(model, models.EXAMPLES)
        assert models.error(models.run(found, models.EXAMPLES), wanted) < 5e-3

    def test_nodes_without_names_are_named_by_their_place(self):
        model = models.like_torch()
        found = half.to_float16(model, ["unnamed_0", "unnamed_8"])  # Conv and Pow
        types = models.dtypes(found)
        assert {types[name] for name in "wb"} == {"float32"}
        assert {types[name] for name in "gc"} == {"float16"}
        wanted = models.run(model, models.EXAMPLES)
        assert models.error(models.run(found, models.EXAMPLES), wanted) < 5e-3

    def test_functions_are_written_out(self):
        model = models.make([node("F", ["x", "w"], ["y"], domain="d")],
                            {"w": models.random(4, 4)}, ["n", 4], ["n", 4])  # fmt: skip
        model.opset_import.append(helper.make_opsetid("d", 1))
        body = [node("MatMul", ["a", "b"], ["c"]), node("Relu", ["c"], ["d"])]
        opset = [helper.make_opsetid("", 18)]
        model.functions.append(helper.make_function("d", "F", ["a", "b"], ["d"], body, opset))
        found = half.to_float16(model)
        assert not found.functions
        assert models.arrays(found)["w"].dtype == np.float16
        x = models.random(3, 4)
        assert models.error(models.run(found, x), models.run(model, x)) < 2e-3


class TestOfInt8:
    """What a strongly typed network of TensorRT is made of."""

    def test_all_but_the_input_is_float16(self, to_int8):
        quantized = to_int8(models.conv_relu_gemm())
        found = half.to_float16(quantized)
        onnx.checker.check_model(found, full_check=True)
        assert found.opset_import[0].version >= 19
        types = models.dtypes(found)
        for op_type in ("Conv", "Relu", "Flatten", "Gemm"):
            (one,) = models.nodes_of(found, op_type)
            assert {types[name] for name in (*one.input, *one.output)} == {"float16"}
        for pair in models.nodes_of(found, "DequantizeLinear"):
            assert [types[name] for name in (*pair.input, *pair.output)] == [
                "int8", "float16", "int8", "float16",
            ]  # fmt: skip
        of_input, inner = models.nodes_of(found, "QuantizeLinear")
        assert [types[name] for name in of_input.input] == ["float32", "float32", "int8"]
        assert [types[name] for name in inner.input] == ["float16", "float16", "int8"]

    def test_scales_stay_what_they_are(self, to_int8):
        quantized = to_int8(models.conv_relu_gemm())
        before, after = models.arrays(quantized), models.arrays(half.to_float16(quantized))
        for name, value in after.items():
            if "_of_" in name and "zero" not in name:
                wanted = before[name.rpartition("_of_")[0]]
                np.testing.assert_array_equal(value.astype(np.float32), wanted)

    @pytest.mark.parametrize("per_channel", [True, False])
    def test_computes_what_numpy_does(self, to_int8, per_channel):
        quantized = to_int8(models.conv_relu_gemm(), per_channel=per_channel)
        scales = {
            name.split("_")[0]: value
            for name, value in models.arrays(quantized).items() if "_zero" not in name
        }  # fmt: skip
        x = models.EXAMPLES[:8]
        found = models.run(half.to_float16(quantized), x, is_optimized=False)
        wanted = models.int8_in_numpy(x, scales)
        assert models.error(found, wanted) < 5e-3  # values at half a step go either way
        assert models.error(found, models.run(models.conv_relu_gemm(), x)) < 0.03

    def test_pairs_of_float32_nodes_stay_float32(self, to_int8):
        found = half.to_float16(to_int8(models.conv_relu_gemm()), ["conv"])
        onnx.checker.check_model(found, full_check=True)
        types = models.dtypes(found)
        (one,) = models.nodes_of(found, "Conv")
        assert {types[name] for name in (*one.input, *one.output)} == {"float32"}
        makers = {name: made.op_type for made in found.graph.node for name in made.output}
        assert [makers.get(name) for name in one.input] == ["DequantizeLinear"] * 2 + [None]
        (gemm,) = models.nodes_of(found, "Gemm")
        assert {types[name] for name in gemm.input} == {"float16"}
        wanted = models.run(models.conv_relu_gemm(), models.EXAMPLES)
        values = models.run(found, models.EXAMPLES, is_optimized=False)
        assert models.error(values, wanted) < 0.03

    @pytest.mark.parametrize("scale", [1e-6 / 3, 1e5])
    def test_scales_that_float16_has_not_stay_float32(self, scale):
        """Tiny ones would be rounded by percents, and large ones be infinite."""
        eye = np.eye(4, dtype=np.float32)
        model = models.make(
            [
                node("MatMul", ["x", "up"], ["a"], name="up"),
                node("QuantizeLinear", ["a", "s", "z"], ["q"], name="q"),
                node("DequantizeLinear", ["q", "s", "z"], ["d"], name="d"),
                node("MatMul", ["d", "down"], ["y"], name="down"),
            ],
            {
                "up": eye * np.float32(scale), "down": eye / np.float32(scale),
                "s": np.float32(scale), "z": np.int8(0),
            },
            ["n", 4],
            ["n", 4],
        )  # fmt: skip
        x = np.arange(8, dtype=np.float32).reshape(2, 4)
        found = half.to_float16(model, ["up", "down"])
        (down,) = [one for one in found.graph.node if one.name == "down"]
        assert [models.dtypes(found)[name] for name in down.input] == ["float32", "float32"]
        np.testing.assert_allclose(models.run(found, x, is_optimized=False), x, rtol=1e-5)

    def test_output_of_a_pair(self):
        model = models.make(
            [
                node("MatMul", ["x", "w"], ["a"]),
                node("QuantizeLinear", ["a", "s", "z"], ["q"]),
                node("DequantizeLinear", ["q", "s", "z"], ["y"]),
            ],
            {"w": models.random(4, 4), "s": np.float32(0.05), "z": np.int8(0)},
            ["n", 4],
            ["n", 4],
        )
        found = half.to_float16(model)
        onnx.checker.check_model(found, full_check=True)
        x = models.random(3, 4)
        wanted = models.run(model, x, is_optimized=False)
        values = models.run(found, x, is_optimized=False)
        np.testing.assert_allclose(values, wanted, atol=0.0501)

    def test_of_both_kinds_and_of_torch(self, to_int8):
        for is_symmetric in (True, False):
            model = models.like_torch()
            found = half.to_float16(to_int8(model, is_symmetric=is_symmetric))
            onnx.checker.check_model(found)
            values = models.run(found, models.EXAMPLES, is_optimized=False)
            assert models.error(values, models.run(model, models.EXAMPLES)) < 0.03


class TestBeyondFloat16:
    def batches(self, *values):
        return [{"x": np.full((2, 4), value, np.float32)} for value in values]

    def test_names_what_reads_or_makes_large_values(self, tmp_path):
        file = tmp_path / "model.onnx"
        onnx.save_model(chain(), file)
        assert half.beyond_float16(file, self.batches(1, 16.3)) == []  # 16,300 < 65,504 / 4
        assert half.beyond_float16(file, self.batches(16.4, 1)) == ["up", "relu", "down"]
        assert half.beyond_float16(file, self.batches(np.nan)) == ["up", "relu", "down"]
        assert half.beyond_float16(file, []) == []

    def test_looks_at_what_comes_in(self, tmp_path):
        model = models.make(
            [node("Mul", ["x", "scale"], ["y"], name="scale")],
            {"scale": np.array(1 / 65535, np.float32)},
            ["n", 4],
            ["n", 4],
        )
        file = tmp_path / "model.onnx"
        onnx.save_model(model, file)
        assert half.beyond_float16(file, self.batches(65535)) == ["scale"]
        assert half.beyond_float16(file, self.batches(255)) == []

    def test_of_nodes_without_names(self, tmp_path):
        model = chain()
        for one in model.graph.node:
            one.name = ""
        file = tmp_path / "model.onnx"
        onnx.save_model(model, file)
        large = half.beyond_float16(file, self.batches(100))
        assert large == ["unnamed_0", "unnamed_1", "unnamed_2"]
        x = np.full((2, 4), 100, np.float32)
        np.testing.assert_allclose(models.run(half.to_float16(model, large), x), x, rtol=1e-6)

    def test_of_int8(self, tmp_path):
        """Tensors between pairs are looked at, too."""
        onnx.save_model(chain(), tmp_path / "model.onnx")
        file = tmp_path / "int8.onnx"
        quantize.to_int8(
            tmp_path / "model.onnx", file, self.batches(100, 50, 25, 5), calibration="minmax",
            per_channel=True, is_symmetric=True,
        )  # fmt: skip
        large = half.beyond_float16(file, self.batches(100))
        assert {"up", "relu", "down"} <= set(large)
        x = np.full((2, 4), 100, np.float32)
        found = half.to_float16(onnx.load(file), large)
        values = models.run(found, x, is_optimized=False)
        np.testing.assert_allclose(values, x, rtol=0.01)
