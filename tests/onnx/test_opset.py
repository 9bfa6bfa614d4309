import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.onnx import models
from tfopt.errors import ConversionError
from tfopt.onnx.opset import lower_opset, opset, raise_opset

node = helper.make_node


class TestRaiseOpset:
    def test_keeps_what_is_new_enough(self):
        model = models.conv_relu_gemm()
        assert raise_opset(model, 18) is model

    def test_raises(self):
        model = models.like_torch(12)
        found = raise_opset(model, 19)
        assert opset(found) == 19
        onnx.checker.check_model(found)
        np.testing.assert_allclose(
            models.run(found, models.EXAMPLES), models.run(model, models.EXAMPLES), atol=1e-5
        )

    def test_says_what_cannot_be_raised(self):
        model = models.make(
            [node("Upsample", ["x", "s"], ["y"])], {"s": np.float32([1, 1, 2, 2])},
            [1, 1, 2, 2], [1, 1, 4, 4], opset=9,
        )  # fmt: skip
        model.graph.node[0].attribute.append(helper.make_attribute("mode", "linear"))
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
        try:
            found = raise_opset(model, 19)
        except ConversionError as error:
            assert "version 9" in str(error)
        else:
            onnx.checker.check_model(found)


class TestLowerOpset:
    @pytest.mark.parametrize("noop", [{}, {"noop_with_empty_axes": 1}])
    def test_reductions_keep_their_axes(self, noop):
        """Two that share axes, which are stored as bytes, as tf2onnx and PyTorch have them."""
        model = models.make(
            [
                node("ReduceMean", ["x", "axes"], ["mean"], keepdims=1, **noop),
                node("Sub", ["x", "mean"], ["centred"]),
                node("ReduceMax", ["centred", "axes"], ["y"], keepdims=0, **noop),
            ],
            {"axes": np.int64([2, 3])}, ["n", 3, 6, 6], ["n", 3],
        )  # fmt: skip
        assert model.graph.initializer[0].raw_data
        before = model.SerializeToString()
        found = lower_opset(model, 17)
        assert opset(found) == 17
        assert model.SerializeToString() == before
        reductions = [n for n in found.graph.node if n.op_type.startswith("Reduce")]
        assert [[tuple(a.ints) for a in n.attribute if a.name == "axes"] for n in reductions] == [
            [(2, 3)], [(2, 3)]
        ]  # fmt: skip
        x = models.EXAMPLES
        wanted = (x - x.mean((2, 3), keepdims=True)).max((2, 3))
        np.testing.assert_allclose(models.run(found, x), wanted, atol=1e-5)

    def test_names_of_nodes_stay(self):
        model = models.conv_relu_gemm()
        found = lower_opset(model, 17)
        assert [n.name for n in found.graph.node] == [n.name for n in model.graph.node]
        np.testing.assert_array_equal(
            models.run(found, models.EXAMPLES), models.run(model, models.EXAMPLES)
        )

    def test_keeps_what_is_old_enough(self):
        model = models.like_torch(12)
        assert lower_opset(model, 17) is model

    def test_says_what_cannot_be_lowered(self):
        model = models.make([node("Mish", ["x"], ["y"])], {}, ["n", 3, 6, 6], ["n", 3, 6, 6])
        with pytest.raises(ConversionError, match="version 18 of ONNX's operators and cannot be"):
            lower_opset(model, 17)
