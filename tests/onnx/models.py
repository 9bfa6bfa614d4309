"""Small ONNX models, and the same computed with NumPy."""

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

EXAMPLES = np.random.default_rng(1).normal(size=(32, 3, 6, 6)).astype(np.float32)


def batches(size=8, examples=EXAMPLES):
    return [{"x": examples[i : i + size]} for i in range(0, len(examples), size)]


def make(nodes, weights, x_shape, y_shape, opset=18, **options):
    """A model with input `x` and output `y`."""
    return helper.make_model(
        helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, y_shape)],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
        **options,
    )


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


WEIGHTS = {
    "w": random(4, 3, 3, 3) * np.float32([0.01, 1, 3, 0.3]).reshape(4, 1, 1, 1),
    "b": random(4, seed=1),
    "g": random(5, 64, seed=2),
    "c": random(5, seed=3),
}


def conv_relu_gemm(opset=18):
    node = helper.make_node
    return make(
        [
            node("Conv", ["x", "w", "b"], ["conv"], name="conv"),
            node("Relu", ["conv"], ["relu"], name="relu"),
            node("Flatten", ["relu"], ["flat"], name="flatten"),
            node("Gemm", ["flat", "g", "c"], ["y"], name="gemm", transB=1),
        ],
        WEIGHTS,
        ["n", 3, 6, 6],
        ["n", 5],
        opset,
    )


def conv(x, w, b):
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], axis=(2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, w) + b.reshape(1, -1, 1, 1)


def int8_in_numpy(x, scale_of):
    """`conv_relu_gemm` with what it multiplies rounded to int8 and back.

    Args:
      x: the input.
      scale_of: the step of `x`, `flat`, `w` and `g`, for each channel of weights.
    """

    def rounded(name, values):
        scale = np.float64(scale_of[name])
        scale = scale.reshape(-1, *[1] * (values.ndim - 1)) if scale.ndim else scale
        return np.clip(np.rint(values / scale), -128, 127) * scale

    weights = {name: np.float64(value) for name, value in WEIGHTS.items()}
    inner = conv(rounded("x", x), rounded("w", weights["w"]), weights["b"])
    flat = np.maximum(inner, 0).reshape(len(x), -1)
    return rounded("flat", flat) @ rounded("g", weights["g"]).T + weights["c"]


def like_torch(opset=12):
    """What PyTorch writes: weights among the inputs, nodes without names, constants as nodes."""
    shape = numpy_helper.from_array(np.array([-1, 64]), "shape")
    steps = numpy_helper.from_array(np.array([1, 0]), "steps")
    two, tiny = (numpy_helper.from_array(np.array(v, np.float32), "v") for v in (2, 1e-5))
    node = helper.make_node
    model = make(
        [
            node("Conv", ["x", "w", "b"], ["11"]),
            node("Sigmoid", ["11"], ["12"]),
            node("Mul", ["11", "12"], ["13"]),
            node("Constant", [], ["14"], value=shape),
            node("Reshape", ["13", "14"], ["15"]),
            node("ReduceMean", ["15"], ["16"], axes=[-1]),
            node("Sub", ["15", "16"], ["17"]),
            node("Constant", [], ["18"], value=two),
            node("Pow", ["17", "18"], ["19"]),
            node("ReduceMean", ["19"], ["20"], axes=[-1]),
            node("Constant", [], ["21"], value=tiny),
            node("Add", ["20", "21"], ["22"]),
            node("Sqrt", ["22"], ["23"]),
            node("Div", ["17", "23"], ["24"]),
            node("Constant", [], ["25"], value=steps),
            node("Shape", ["24"], ["26"]),
            node("Gather", ["26", "25"], ["27"]),
            node("Cast", ["27"], ["28"], to=TensorProto.FLOAT),
            node("ReduceSum", ["28"], ["29"], keepdims=0),
            node("Div", ["24", "29"], ["30"]),
            node("Gemm", ["30", "g", "c"], ["y"], transB=1),
        ],
        WEIGHTS,
        ["n", 3, 6, 6],
        ["n", 5],
        opset,
        producer_name="pytorch",
    )
    model.graph.input.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape)
        for name, value in WEIGHTS.items()
    )
    return model


def run(model, x, *, is_optimized=True):
    """The output; as it is written when not optimized, with the order of rounding kept."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not is_optimized:
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(["y"], {"x": x})[0]


def arrays(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def nodes_of(model, op_type):
    return [node for node in model.graph.node if node.op_type == op_type]


def dtypes(model):
    """The dtype of every tensor, by shape inference and without a guess."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    values = (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)
    found = {
        value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
        for value in values
    }
    return found | {name: value.dtype.name for name, value in arrays(model).items()}


def error(found, reference):
    return np.linalg.norm(found - reference) / np.linalg.norm(reference - reference.mean())
