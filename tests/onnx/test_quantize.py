import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests.onnx import models
from tfopt.errors import ConversionError, InputError
from tfopt.onnx import quantize, symmetric
from tfopt.onnx.calibration import METHODS

node = helper.make_node
finite = st.floats(0, 1e30, allow_subnormal=False)


@pytest.fixture
def to_int8(tmp_path):
    """Converts a model and reads the result."""

    def convert(model, batches=None, **options):
        onnx.save_model(model, tmp_path / "model.onnx")
        settings = {"calibration": "minmax", "per_channel": True, "is_symmetric": True, **options}
        convert.notes = quantize.to_int8(
            tmp_path / "model.onnx",
            tmp_path / "int8.onnx",
            models.batches() if batches is None else batches,
            **settings,
        )
        found = onnx.load(tmp_path / "int8.onnx")
        onnx.checker.check_model(found, full_check=True)
        return found

    return convert


def readers(model):
    """What each input of the nodes comes from: `Q` of which tensor, or the tensor."""
    made = {name: n for n in model.graph.node for name in n.output}

    def origin(name):
        if name in made and made[name].op_type == "DequantizeLinear":
            stored = made[name].input[0]
            return f"Q({made[stored].input[0] if stored in made else stored})"
        return name

    return {
        n.name: [origin(name) for name in n.input]
        for n in model.graph.node
        if n.op_type not in quantize.QDQ
    }


class TestSymmetric:
    def test_scales_are_largest_values_over_127(self, to_int8):
        x = models.EXAMPLES.copy()
        x[3, 1, 2, 2], x[17, 0, 0, 0] = 6.5, -8  # the larger end counts
        values = models.arrays(to_int8(models.conv_relu_gemm(), models.batches(8, x)))
        relu = np.maximum(models.conv(x, models.WEIGHTS["w"], models.WEIGHTS["b"]), 0)
        wanted = {
            "x_scale": 8,
            "flat_scale": relu.max(),
            "w_scale_of_axis_0": np.abs(models.WEIGHTS["w"]).max((1, 2, 3)),
            "g_scale_of_axis_0": np.abs(models.WEIGHTS["g"]).max(1),
        }
        for name, limit in wanted.items():
            np.testing.assert_allclose(values[name], np.float32(limit) / 127, rtol=1e-3)
            assert (values[name] >= np.float64(limit) / 127 * (1 - 1e-6)).all()
            assert values[name].dtype == np.float32

    def test_zero_points_are_0_and_int8(self, to_int8):
        found = to_int8(models.conv_relu_gemm())
        values = models.arrays(found)
        pairs = [n for n in found.graph.node if n.op_type in quantize.QDQ]
        assert len(pairs) == 8
        for pair in pairs:
            assert values[pair.input[2]].dtype == np.int8
            assert values[pair.input[2]].shape == values[pair.input[1]].shape
            assert not values[pair.input[2]].any()

    @pytest.mark.parametrize("per_channel", [True, False])
    @pytest.mark.parametrize("calibration", METHODS)
    def test_computes_what_numpy_does(self, to_int8, calibration, per_channel):
        found = to_int8(models.conv_relu_gemm(), calibration=calibration, per_channel=per_channel)
        values = models.arrays(found)
        assert (values["w_scale_of_axis_0" if per_channel else "w_scale"].ndim == 1) == per_channel
        scales = {
            name.split("_")[0]: value for name, value in values.items() if "_zero" not in name
        }
        x = models.EXAMPLES[:4]
        wanted = models.int8_in_numpy(x, scales)
        outputs = models.run(found, x, is_optimized=False)
        # float32 may fall to the other side of a half step than float64
        step = float(scales["flat"]) * np.abs(models.WEIGHTS["g"]).max()
        np.testing.assert_allclose(outputs, wanted, atol=1.01 * step)
        assert np.median(np.abs(outputs - wanted)) < 1e-5
        error = models.error(outputs, models.run(models.conv_relu_gemm(), x))
        assert 1e-4 < error < (0.2 if calibration == "entropy" else 0.03)

    def test_channels_of_small_weights_keep_their_steps(self, to_int8):
        """One scale for all would leave the first channel, a 300th of the third, 0 or 1 steps."""
        errors = [
            models.error(
                models.run(to_int8(models.conv_relu_gemm(), per_channel=flag), models.EXAMPLES),
                models.run(models.conv_relu_gemm(), models.EXAMPLES),
            )
            for flag in (True, False)
        ]
        assert errors[0] < errors[1]

    def test_biases_and_outputs_stay_float(self, to_int8):
        found = to_int8(models.conv_relu_gemm())
        assert readers(found) == {
            "conv": ["Q(x)", "Q(w)", "b"],
            "relu": ["conv"],
            "flatten": ["relu"],
            "gemm": ["Q(flat)", "Q(g)", "c"],
        }
        assert found.graph.output[0].name == "y"
        assert models.arrays(found)["b"].dtype == np.float32
        np.testing.assert_array_equal(models.arrays(found)["w"], models.WEIGHTS["w"])

    def test_shortcuts_are_quantized_and_what_is_fused_is_not(self, to_int8):
        weights = {name: models.random(4, 4, 1, 1, seed=i) for i, name in enumerate("stuv")}
        model = models.make(
            [
                node("Conv", ["x", "s"], ["a"], name="a"),
                node("Relu", ["a"], ["b"], name="b"),
                node("Conv", ["b", "t"], ["c"], name="c"),
                node("Add", ["c", "b"], ["d"], name="identity"),
                node("Relu", ["d"], ["e"], name="e"),
                node("Conv", ["e", "u"], ["f"], name="f"),
                node("Conv", ["e", "v"], ["g"], name="g"),
                node("Add", ["f", "g"], ["h"], name="projection"),
                node("MaxPool", ["h"], ["i"], name="maximum", kernel_shape=[2, 2]),
                node("AveragePool", ["i"], ["j"], name="average", kernel_shape=[2, 2]),
                node("Add", ["j", "j"], ["y"], name="other"),
            ],
            weights,
            ["n", 4, 6, 6],
            ["n", 4, 4, 4],
        )
        x = np.random.default_rng(0).normal(size=(16, 4, 6, 6)).astype(np.float32)
        found = to_int8(model, models.batches(4, x))
        assert readers(found) == {
            "a": ["Q(x)", "Q(s)"],
            "b": ["a"],
            "c": ["Q(b)", "Q(t)"],
            "identity": ["c", "Q(b)"],
            "e": ["d"],
            "f": ["Q(e)", "Q(u)"],
            "g": ["Q(e)", "Q(v)"],
            "projection": ["Q(f)", "g"],
            "maximum": ["h"],
            "average": ["Q(i)"],
            "other": ["j", "j"],
        }
        written = [name for n in found.graph.node for name in n.input if name.endswith("zed")]
        assert len(written) == len(set(written)), "a pair has one reader"
        assert models.error(models.run(found, x), models.run(model, x)) < 0.03

    def test_axes_of_channels(self, to_int8):
        model = models.make(
            [
                node("ConvTranspose", ["x", "t"], ["a"], name="a"),
                node("ConvTranspose", ["a", "u"], ["b"], name="b", group=2),
                node("Flatten", ["b"], ["c"], name="c"),
                node("Gemm", ["c", "g"], ["d"], name="d"),
                node("MatMul", ["d", "m"], ["y"], name="y"),
            ],
            {
                "t": models.random(3, 6, 1, 1),
                "u": models.random(6, 1, 1, 1),
                "g": models.random(72, 5),
                "m": models.random(5, 7),
            },
            ["n", 3, 6, 6],
            ["n", 7],
        )
        values = models.arrays(to_int8(model))
        shapes = {name: v.shape for name, v in values.items() if name[:2] in ("t_", "g_", "m_")}
        for name, shape in {"g": (5,), "m": (7,)}.items():
            assert shapes[f"{name}_scale_of_axis_1"] == shape
        # TensorRT computes something else with scales of output channels of transposed ones.
        assert values["t_scale"].shape == ()
        assert "u_scale" not in values  # nor does it take groups of those

    def test_convolutions_tell_their_kernel_shape(self, to_int8):
        """A pair hides the weights, whose shape TensorRT before 10.4 does not look up."""
        made = [node("Conv", ["x", "w"], ["y"], name="conv")]
        model = models.make(made, {"w": models.random(4, 3, 3, 2)}, ["n", 3, 6, 6], ["n", 4, 4, 5])
        (conv,) = (found for found in to_int8(model).graph.node if found.op_type == "Conv")
        (shape,) = (item.ints for item in conv.attribute if item.name == "kernel_shape")
        assert list(shape) == [3, 2]

    def test_products_of_activations_stay_float(self, to_int8):
        model = models.make(
            [
                node("MatMul", ["x", "m"], ["a"], name="a"),
                node("Transpose", ["x"], ["b"], name="b", perm=[0, 2, 1]),
                node("MatMul", ["b", "a"], ["y"], name="y"),
            ],
            {"m": models.random(4, 6)},
            ["n", 3, 4],
            ["n", 4, 6],
        )
        found = to_int8(model, [{"x": models.random(8, 3, 4)}])
        assert readers(found) == {"a": ["Q(x)", "Q(m)"], "b": ["x"], "y": ["b", "a"]}

    def test_nothing_to_quantize(self, to_int8):
        model = models.make([node("Relu", ["x"], ["y"])], {}, ["n", 3], ["n", 3])
        with pytest.raises(ConversionError, match="no convolution or matrix product"):
            to_int8(model, [{"x": models.random(8, 3)}])

    def test_values_that_are_always_0(self, to_int8):
        zeros = [{"x": np.zeros((8, 3, 6, 6), np.float32)}]
        found = to_int8(models.conv_relu_gemm(), zeros)
        assert models.arrays(found)["x_scale"] > 0
        assert np.isfinite(models.run(found, models.EXAMPLES[:2])).all()

    def test_weights_can_be_stored_in_int8(self, to_int8):
        model = models.conv_relu_gemm()
        found = to_int8(model)
        stored = onnx.ModelProto.FromString(found.SerializeToString())
        quantize.store_int8_weights(stored)
        onnx.checker.check_model(stored, full_check=True)
        values = models.arrays(stored)
        assert sorted(v.dtype.name for v in values.values() if v.ndim > 1) == ["int8", "int8"]
        assert {n.input[0] for n in models.nodes_of(stored, "QuantizeLinear")} == {"x", "flat"}
        np.testing.assert_array_equal(
            models.run(stored, models.EXAMPLES, is_optimized=False),
            models.run(found, models.EXAMPLES, is_optimized=False),
        )


class TestBoth:
    @pytest.mark.parametrize("is_symmetric", [True, False])
    def test_model_like_those_of_torch(self, to_int8, is_symmetric):
        """Its opset is older than scales for each channel."""
        model = models.like_torch()
        found = to_int8(model, is_symmetric=is_symmetric)
        assert found.opset_import[0].version >= 13
        found, wanted = (models.run(m, models.EXAMPLES) for m in (found, model))
        assert models.error(found, wanted) < 0.03

    @pytest.mark.parametrize("is_symmetric", [True, False])
    def test_excluded_nodes_are_left_as_they_are(self, to_int8, is_symmetric):
        found = to_int8(models.conv_relu_gemm(), is_symmetric=is_symmetric, excluded=["gemm"])
        assert readers(found)["gemm"][1:] == ["g", "c"]
        assert "Q(x)" in str(readers(found))
        np.testing.assert_array_equal(models.arrays(found)["g"], models.WEIGHTS["g"])

    @pytest.mark.parametrize("is_symmetric", [True, False])
    def test_excluded_nodes_are_not_fused_away(self, to_int8, is_symmetric):
        model = models.make(
            [
                node("MatMul", ["x", "m"], ["a"], name="product"),
                node("Add", ["a", "s"], ["b"], name="sum"),
                node("MatMul", ["b", "n"], ["y"], name="last"),
            ],
            {"m": models.random(4, 5), "s": models.random(5), "n": models.random(5, 3)},
            ["n", 4],
            ["n", 3],
        )
        batches = [{"x": models.random(8, 4)}]
        assert "product" not in readers(to_int8(model, batches, is_symmetric=is_symmetric))
        found = to_int8(model, batches, is_symmetric=is_symmetric, excluded=["product"])
        assert readers(found)["product"][1] == "m"
        assert models.arrays(found)["m"].dtype == np.float32

    def test_unknown_excluded_node(self, to_int8):
        with pytest.raises(InputError, match="no node 'dense'"):
            to_int8(models.conv_relu_gemm(), excluded=["conv", "dense"])

    @pytest.mark.parametrize("is_symmetric", [True, False])
    @pytest.mark.parametrize("calibration", METHODS)
    def test_no_examples(self, to_int8, calibration, is_symmetric):
        with pytest.raises(ConversionError, match=r"there are none.*`data`"):
            to_int8(models.conv_relu_gemm(), [], calibration=calibration, is_symmetric=is_symmetric)

    @pytest.mark.parametrize(("count", "says"), [(1, "1 example only"), (7, "7 examples only")])
    def test_few_examples_are_said(self, to_int8, count, says):
        to_int8(models.conv_relu_gemm(), models.batches(3, models.EXAMPLES[:count]))
        (note,) = to_int8.notes
        assert says in note
        assert "`data`" in note

    def test_enough_examples(self, to_int8):
        to_int8(models.conv_relu_gemm(), models.batches(3, models.EXAMPLES[:8]))
        assert to_int8.notes == []

    def test_ranges_come_from_all_batches(self, to_int8):
        """Of many batches, more than are held at a time."""
        x = models.random(40, 3, 6, 6)
        x[-1] *= 10
        for calibration in ("minmax", "percentile"):
            found = to_int8(models.conv_relu_gemm(), models.batches(1, x), calibration=calibration)
            few = to_int8(
                models.conv_relu_gemm(), models.batches(1, x[:-1]), calibration=calibration
            )
            scales = [models.arrays(model)["x_scale"] for model in (found, few)]
            assert scales[0] > scales[1] * (5 if calibration == "minmax" else 1)

    @pytest.mark.parametrize("is_symmetric", [True, False])
    def test_rare_values_are_cut_off_when_asked(self, to_int8, is_symmetric):
        x = np.random.default_rng(0).standard_t(2, size=(64, 3, 6, 6)).astype(np.float32)
        scales = {}
        for calibration in METHODS:
            found = to_int8(
                models.conv_relu_gemm(), models.batches(8, x),
                calibration=calibration, is_symmetric=is_symmetric,
            )  # fmt: skip
            scales[calibration] = float(models.arrays(found)["x_scale"])
        step = np.abs(x).max() / 127 if is_symmetric else np.ptp(x) / 255
        assert scales["minmax"] == pytest.approx(step, rel=1e-3)
        assert scales["percentile"] < scales["minmax"]
        assert scales["entropy"] < scales["minmax"]

    @pytest.mark.parametrize("is_symmetric", [True, False])
    def test_entropy_keeps_the_range_of_few_values(self, to_int8, is_symmetric):
        x = np.random.default_rng(0).standard_t(2, size=(8, 3, 6, 6)).astype(np.float32)
        scales = [
            models.arrays(
                to_int8(
                    models.conv_relu_gemm(), models.batches(8, x),
                    calibration=calibration, is_symmetric=is_symmetric,
                )
            )["x_scale"]
            for calibration in ("minmax", "entropy")
        ]  # fmt: skip
        assert scales[1] == pytest.approx(scales[0], rel=1e-3)

    def test_asymmetric_activations_are_uint8(self, to_int8):
        """With weights of 7 bits, whose sums are right on every processor."""
        found = to_int8(models.conv_relu_gemm(), is_symmetric=False, reduce_range=True)
        values = models.arrays(found)
        assert values["x_zero_point"].dtype == np.uint8
        assert 100 < values["x_zero_point"] < 156
        assert values["w_quantized"].dtype == np.int8
        assert np.abs(values["w_quantized"].astype(int)).max() <= 64
        wanted = models.run(models.conv_relu_gemm(), models.EXAMPLES)
        assert models.error(models.run(found, models.EXAMPLES), wanted) < 0.03


def gelu_between_products():
    """x + x³ as in the tanh form of GELU, with values up to 400 where most lie near 1."""
    return models.make(
        [
            node("MatMul", ["x", "m"], ["a"], name="first"),
            node("Mul", ["a", "a"], ["square"], name="square"),
            node("Mul", ["a", "square"], ["cube"], name="cube"),
            node("Mul", ["cube", "k"], ["scaled"], name="scaled"),
            node("Add", ["a", "scaled"], ["inner"], name="inner"),
            node("Mul", ["inner", "c"], ["argument"], name="argument"),
            node("Tanh", ["argument"], ["t"], name="t"),
            node("Add", ["t", "one"], ["above"], name="above"),
            node("Mul", ["a", "above"], ["gelu"], name="gelu"),
            node("MatMul", ["gelu", "n"], ["y"], name="second"),
        ],
        {
            "m": models.random(8, 16),
            "n": models.random(16, 4, seed=1),
            "k": np.float32(0.044715).reshape(1),
            "c": np.float32(np.sqrt(2 / np.pi)).reshape(1),
            "one": np.ones(1, np.float32),
        },
        ["n", 8],
        ["n", 4],
    )


class TestOnlyProducts:
    @pytest.mark.parametrize("is_symmetric", [True, False])
    def test_nothing_else_is_quantized(self, to_int8, is_symmetric):
        batches = [{"x": models.random(64, 8, seed=2)}]
        found = to_int8(
            gelu_between_products(), batches,
            is_symmetric=is_symmetric, reduce_range=not is_symmetric, only_products=True,
        )  # fmt: skip
        inputs = readers(found)
        for name in ("first", "second"):
            assert all("Q(" in tensor for tensor in inputs[name])
        made = {tensor for names in inputs.values() for tensor in names}
        assert {"square", "cube", "scaled", "inner", "argument", "t", "above"} <= made

    def test_keeps_what_int8_sums_lose(self, to_int8):
        x = 3 * models.random(256, 8, seed=2)
        wanted = models.run(gelu_between_products(), x)
        errors = {}
        for only_products in (True, False):
            found = to_int8(
                gelu_between_products(), [{"x": x}],
                is_symmetric=False, reduce_range=True, only_products=only_products,
            )  # fmt: skip
            errors[only_products] = models.error(models.run(found, x), wanted)
        assert errors[True] < 0.03
        assert errors[False] > 3 * errors[True]

    def test_fused_activation_functions_are_int8(self, to_int8):
        found = to_int8(
            models.conv_relu_gemm(), is_symmetric=False, reduce_range=True, only_products=True
        )
        assert not models.nodes_of(found, "Relu")  # the range of its product begins at 0
        wanted = models.run(models.conv_relu_gemm(), models.EXAMPLES)
        assert models.error(models.run(found, models.EXAMPLES), wanted) < 0.03


def log_then_gemm():
    """Values below 0 become NaN and 0 becomes infinity, and a Where replaces both by 0."""
    return models.make(
        [
            node("Log", ["x"], ["log"], name="log"),
            node("Mul", ["log", "two"], ["product"], name="product"),
            node("Abs", ["product"], ["abs"], name="abs"),
            node("Less", ["abs", "limit"], ["is_finite"], name="less"),
            node("Where", ["is_finite", "product", "zero"], ["filled"], name="where"),
            node("Flatten", ["filled"], ["flat"], name="flatten"),
            node("Gemm", ["flat", "g", "c"], ["y"], name="gemm", transB=1),
        ],
        {
            "two": np.float32([2]),
            "limit": np.float32(1e30),
            "zero": np.float32(0),
            "g": models.random(5, 108, seed=2),
            "c": models.random(5, seed=3),
        },
        ["n", 3, 6, 6],
        ["n", 5],
        17,
    )


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("calibration", METHODS)
class TestNotFinite:
    def test_inside_stays_float32_and_is_named(self, to_int8, calibration, is_symmetric):
        model = log_then_gemm()
        x = np.abs(models.EXAMPLES) + 0.1
        x[:, 0, 0, 0], x[:, 1, 0, 0] = 0, -1
        found = to_int8(
            model, models.batches(8, x), calibration=calibration, is_symmetric=is_symmetric,
            per_channel=False, reduce_range=not is_symmetric,
        )  # fmt: skip
        limit = 0.2 if calibration == "entropy" else 0.05
        assert models.error(models.run(found, x), models.run(model, x)) < limit
        assert readers(found)["gemm"][1] != "g"
        if not is_symmetric:  # which quantizes no Mul and no Where
            assert readers(found)["product"] == ["log", "two"]
            (note,) = to_int8.notes
            assert note.startswith("2 operations stay float32 beside NaN")
            assert "log, product" in note


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("calibration", ["percentile", "entropy"])
class TestHistograms:
    """Values that ONNX Runtime's own collector of histograms fails for."""

    @pytest.mark.parametrize("factors", [(1, 1e6), (1e-40, 1e-40), (1e-38, 1), (0, 1), (0, 0)])
    def test_values_of_any_size(self, to_int8, calibration, is_symmetric, factors):
        x = models.EXAMPLES.copy()
        x[:16] *= np.float32(factors[0])
        x[16:] *= np.float32(factors[1])
        batches = models.batches(1, x)  # more than are held at a time
        found = to_int8(
            models.conv_relu_gemm(), batches, calibration=calibration, is_symmetric=is_symmetric
        )
        scales = [v for name, v in models.arrays(found).items() if name.endswith("_scale")]
        assert all(np.isfinite(value).all() and np.all(value > 0) for value in scales)
        assert np.isfinite(models.run(found, x)).all()

    def test_batches_of_different_sizes(self, to_int8, calibration, is_symmetric):
        batches = [{"x": models.EXAMPLES[:20]}, {"x": models.EXAMPLES[20:23]}]
        found = to_int8(
            models.conv_relu_gemm(), batches, calibration=calibration, is_symmetric=is_symmetric,
            reduce_range=not is_symmetric,
        )  # fmt: skip
        wanted = models.run(models.conv_relu_gemm(), models.EXAMPLES)
        assert models.error(models.run(found, models.EXAMPLES), wanted) < 0.2


class TestBiases:
    """What ONNX allows of a Gemm's third input, and ONNX Runtime's quantizer does not."""

    @pytest.mark.parametrize("shape", [(1, 5), (5,), (1,), (), (32, 5), (32, 1)])
    def test_of_any_shape(self, to_int8, shape):
        model = models.make(
            [
                node("Flatten", ["x"], ["flat"]),
                node("Gemm", ["flat", "g", "c"], ["y"], transB=1),
            ],
            {
                "g": models.random(5, 108, seed=2),
                "c": models.random(*shape, seed=3) + np.float32(3),
            },
            [32, 3, 6, 6],
            [32, 5],
            17,
        )
        found = to_int8(model, models.batches(32), is_symmetric=False, reduce_range=True)
        assert "QuantizeLinear" in {n.op_type for n in found.graph.node}
        wanted = models.run(model, models.EXAMPLES)
        assert models.error(models.run(found, models.EXAMPLES), wanted) < 0.05


class TestScaleOf:
    @given(finite)
    def test_float16_has_it_and_nothing_is_cut_off(self, limit):
        scale = symmetric.scale_of(limit)
        assert scale > 0
        if limit / 127 <= 65504:
            assert np.float32(np.float16(scale)) == scale
        assert np.float64(scale) * 127 >= limit * (1 - 1e-7)
        if 127 * 2.0**-14 <= limit <= 127 * 65504:
            assert scale <= limit / 127 * (1 + 2**-10)

    def test_of_channels(self):
        limits = np.float32([0, 1, 127, 1e9])
        np.testing.assert_allclose(
            symmetric.scale_of(limits), [2**-24, 1 / 127, 1, 1e9 / 127], rtol=1e-3
        )


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("axis", [None, 0, 2])
def test_quantizes_as_onnx_does(dtype, axis):
    generator = np.random.default_rng(0)
    values = generator.normal(scale=3, size=(4, 5, 6)).astype(np.float32)
    values[0, 0, :4] = [0.5, 1.5, -2.5, 1e6]
    shape = () if axis is None else (values.shape[axis],)
    scale = np.exp2(generator.integers(-6, 0, shape)).astype(np.float32)
    zero_point = generator.integers(0, 5, shape).astype(dtype)
    options = {} if axis is None else {"axis": axis}
    model = models.make(
        [
            node("QuantizeLinear", ["x", "s", "z"], ["q"], **options),
            node("Cast", ["q"], ["y"], to=TensorProto.FLOAT),
        ],
        {"s": np.asarray(scale), "z": np.asarray(zero_point)},
        values.shape,
        values.shape,
    )
    found = symmetric.quantize(values, np.asarray(scale), np.asarray(zero_point), axis or 0)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, models.run(model, values))


def test_stores_only_what_is_constant_and_8_bits(tmp_path):
    """And keeps what others read."""
    model = models.make(
        [
            node("QuantizeLinear", ["w", "s"], ["q"]),  # of uint8, as there is no zero point
            node("DequantizeLinear", ["q", "s"], ["r"]),
            node("MatMul", ["x", "r"], ["a"]),
            node("Add", ["a", "w"], ["b"]),
            node("QuantizeLinear", ["b", "s"], ["c"]),
            node("DequantizeLinear", ["c", "s"], ["y"]),
        ],
        {"w": np.abs(models.random(4, 4)), "s": np.float32(0.02)},
        [4, 4],
        [4, 4],
    )
    x = np.abs(models.random(4, 4, seed=5))
    wanted = models.run(model, x, is_optimized=False)
    quantize.store_int8_weights(model)
    assert {name: value.dtype.name for name, value in models.arrays(model).items()} == {
        "w": "float32",
        "s": "float32",
        "q": "uint8",
    }
    np.testing.assert_array_equal(models.run(model, x, is_optimized=False), wanted)


def test_reads_weights_beside_the_model(tmp_path):
    onnx.save_model(
        models.conv_relu_gemm(),
        tmp_path / "model.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    quantize.to_int8(
        tmp_path / "model.onnx",
        tmp_path / "int8.onnx",
        models.batches(),
        calibration="minmax",
        per_channel=True,
        is_symmetric=True,
    )
    (tmp_path / "weights.bin").unlink()
    session = onnxruntime.InferenceSession(str(tmp_path / "int8.onnx"))
    wanted = models.run(models.conv_relu_gemm(), models.EXAMPLES)
    assert models.error(session.run(None, {"x": models.EXAMPLES})[0], wanted) < 0.03
    assert numpy_helper.to_array(onnx.load(tmp_path / "int8.onnx").graph.initializer[0]).size
