"""Poolings of padded values in ONNX Runtime, with its optimizer on, against NumPy."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.onnx import models
from tfopt import source
from tfopt.onnx import padding
from tfopt.runtimes.onnxruntime import _copy_model

node = helper.make_node
NEGATIVE = -np.abs(models.random(2, 3, 6, 6)) - 0.1


def pad_then(op, *between, mode="constant", before=(), **attributes):
    """A model that pads with a row and a column of zeros at the end and takes 3 × 3 windows."""
    nodes = [
        *before,
        node("Pad", ["r" if before else "x", "p"], ["q"], mode=mode),
        *between,
        node(
            op, [between[-1].output[0] if between else "q"], ["y"],
            name="pool", kernel_shape=[3, 3], strides=[2, 2], **attributes,
        ),
    ]  # fmt: skip
    weights = {
        "p": np.array([0, 0, 0, 0, 0, 0, 1, 1]),
        "zero": np.float32(0),
        "low": np.float32(-9),
        "scale": np.float32(0.5),
        "middle": np.uint8(128),
    }
    return models.make(nodes, weights, ["n", 3, 6, 6], ["n", "c", "h", "w"], opset=17)


def pooled(x, reduce, value=0.0):
    """Windows of 3 × 3 every 2 over a row and a column of a value at the end."""
    padded = np.pad(x, [(0, 0), (0, 0), (0, 1), (0, 1)], constant_values=value)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return reduce(windows[:, :, ::2, ::2], axis=(-2, -1))


class TestKeepZeros:
    @pytest.mark.parametrize("pads", [{}, {"pads": [0, 0, 0, 0]}, {"auto_pad": "NOTSET"}])
    @pytest.mark.parametrize(("op", "reduce"), [("MaxPool", np.max), ("AveragePool", np.mean)])
    def test_windows_at_the_border_hold_zeros(self, op, reduce, pads):
        model = pad_then(op, **pads)
        assert padding.keep_zeros(model) == 1
        onnx.checker.check_model(model, full_check=True)
        found = models.run(model, NEGATIVE)
        np.testing.assert_allclose(found, pooled(NEGATIVE, reduce), rtol=1e-6)

    @pytest.mark.parametrize(
        "between",
        [
            [node("Cast", ["q"], ["c"], to=TensorProto.FLOAT)],
            [node("Identity", ["q"], ["c"])],
            [
                node("Transpose", ["q"], ["t"], perm=[0, 2, 3, 1]),
                node("Transpose", ["t"], ["c"], perm=[0, 3, 1, 2]),
            ],
            [
                node("QuantizeLinear", ["q", "scale", "middle"], ["t"]),
                node("DequantizeLinear", ["t", "scale", "middle"], ["c"]),
            ],
        ],
        ids=["cast", "identity", "transposes", "quantized"],
    )
    def test_also_through_what_the_optimizer_moves(self, between):
        model = pad_then("MaxPool", *between)
        wanted = models.run(model, NEGATIVE, is_optimized=False)
        assert padding.keep_zeros(model) == 1
        np.testing.assert_array_equal(models.run(model, NEGATIVE), wanted)

    @pytest.mark.parametrize(
        "attributes", [{"pads": [1, 1, 0, 0]}, {"ceil_mode": 1}], ids=["pads", "ceil_mode"]
    )
    def test_own_padding_or_rounding_stays(self, attributes):
        model = pad_then("MaxPool", **attributes)
        wanted = models.run(model, NEGATIVE, is_optimized=False)
        assert padding.keep_zeros(model) == 1
        np.testing.assert_array_equal(models.run(model, NEGATIVE), wanted)

    @pytest.mark.parametrize(
        ("before", "is_kept"),
        [
            (node("Relu", ["x"], ["r"]), False),
            (node("Clip", ["x", "zero"], ["r"]), False),
            (node("Clip", ["x", "low"], ["r"]), True),
            (node("Neg", ["x"], ["r"]), True),
        ],
        ids=["relu", "clip from 0", "clip from -9", "neg"],
    )
    def test_only_values_that_may_be_negative(self, before, is_kept):
        model = pad_then("MaxPool", before=[before])
        wanted = models.run(model, models.EXAMPLES, is_optimized=False)
        assert padding.keep_zeros(model) == is_kept
        np.testing.assert_array_equal(models.run(model, models.EXAMPLES), wanted)

    @pytest.mark.parametrize(
        "model",
        [
            pad_then("MaxPool", mode="edge"),
            pad_then("MaxPool", auto_pad="SAME_UPPER"),
            pad_then("LpPool"),
            models.conv_relu_gemm(),
        ],
        ids=["edge", "same", "other pooling", "no pooling"],
    )
    def test_the_rest_stays_as_it_is(self, model):
        before = model.SerializeToString()
        assert padding.keep_zeros(model) == 0
        assert model.SerializeToString() == before

    def test_inside_branches(self):
        inner = pad_then("MaxPool").graph
        inner.ClearField("input")
        other = helper.make_graph(
            [node("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2])],
            "other", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        )  # fmt: skip
        model = models.make(
            [node("If", ["condition"], ["y"], then_branch=inner, else_branch=other)],
            {"condition": np.array(True)}, ["n", 3, 6, 6], ["n", "c", "h", "w"], opset=17,
        )  # fmt: skip
        assert padding.keep_zeros(model) == 1
        np.testing.assert_array_equal(models.run(model, NEGATIVE), pooled(NEGATIVE, np.max))


def test_onnx_sources_are_mended_with_a_note(tmp_path):
    model = pad_then("MaxPool")
    weights = np.full((16, 3, 1, 1), 0.5, np.float32)
    model.graph.node[-1].output[0] = "pooled"
    model.graph.node.append(node("Conv", ["pooled", "w"], ["y"]))
    model.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    (tmp_path / "in").mkdir()
    onnx.save_model(
        model, tmp_path / "in" / "model.onnx",
        save_as_external_data=True, location="weights.bin", size_threshold=100,
    )  # fmt: skip
    path = source.prepare(tmp_path / "in" / "model.onnx", tmp_path / "source").path
    (tmp_path / "out").mkdir()
    (note,) = _copy_model(path, tmp_path / "out")
    assert note.startswith("1 pooling of padded values")
    found = models.run(onnx.load(tmp_path / "out" / "model.onnx"), NEGATIVE)
    wanted = np.repeat(pooled(NEGATIVE, np.max).sum(1, keepdims=True) / 2, 16, axis=1)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
