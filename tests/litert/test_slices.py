"""New axes in slices on LiteRT, against NumPy."""

import numpy as np
import pytest

from tfopt import source
from tfopt.litert import rewrites
from tfopt.runtimes import load
from tfopt.search import steps
from tfopt.variant import Variant

# By the number of dimensions that are sliced.
SLICES = {
    2: {
        "first": np.s_[None],
        "middle": np.s_[:, None],
        "middle_whole": np.s_[:, None, :],
        "last": np.s_[..., None],
        "both_ends": np.s_[None, ..., None],
        "in_a_row": np.s_[:, None, None, :],
        "of_a_range": np.s_[:, None, 1:-1],
        "reversed": np.s_[:, None, ::-2],
        "around_an_index": np.s_[None, :, None, 1, None],
    },
    3: {
        "fourth": np.s_[:, None, :, :],
        "fourth_and_fifth": np.s_[:, None, None],
        "behind_an_ellipsis": np.s_[:, ..., None, 2:],
        "before_an_ellipsis": np.s_[:, None, ..., 1],
        "empty_ellipsis": np.s_[:, :, None, ..., :2],
        "six_dimensions": np.s_[None, :, None, 1:, None, :],
    },
}
DTYPES = ("float32", "int32", "bool")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """All slices in one model with free sizes."""
    import tensorflow as tf

    def call(**inputs):
        return {
            f"{dtype}_{name}": inputs[f"{dtype}_{rank}"][places]
            for rank, slices in SLICES.items()
            for name, places in slices.items()
            for dtype in DTYPES
        }

    module = tf.Module()
    module.call = tf.function(call)
    specs = {
        f"{dtype}_{rank}": tf.TensorSpec((None,) * rank, dtype, f"{dtype}_{rank}")
        for rank in SLICES
        for dtype in DTYPES
    }
    folder = tmp_path_factory.mktemp("slices")
    tf.saved_model.save(
        module, str(folder / "model"), signatures=module.call.get_concrete_function(**specs)
    )
    prepared = source.prepare(folder / "model", folder / "source")
    variant = Variant.parse("float32@litert")
    return steps.convert(prepared, variant, folder / "artifact", None, None, 1)


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 6, 3)])
def test_every_slice(converted, shape):
    random = np.random.default_rng(0)
    inputs = {
        f"{dtype}_{rank}": random.integers(-9, 9, shape[:rank]).astype(dtype)
        for rank in SLICES
        for dtype in DTYPES
    }
    assert converted.signature.batch_size is None
    with load(converted) as session:
        found = session.run(inputs)
    for rank, slices in SLICES.items():
        for name, places in slices.items():
            for dtype in DTYPES:
                np.testing.assert_array_equal(
                    found[f"{dtype}_{name}"], inputs[f"{dtype}_{rank}"][places], err_msg=name
                )


@pytest.mark.parametrize(
    ("shape", "places", "is_rewritten"),
    [
        ((None, 4), np.s_[:, None, 1:], False),
        ((None, 4, 3, 2), np.s_[:, None, :, None, :, None], True),
    ],
    ids=["few dimensions", "many dimensions"],
)
def test_fixed_sizes(tmp_path, shape, places, is_rewritten):
    import tensorflow as tf

    module = tf.Module()
    module.call = tf.function(
        lambda x: {"y": x[places]}, input_signature=[tf.TensorSpec(shape, name="x")]
    )
    tf.saved_model.save(module, str(tmp_path / "model"), signatures=module.call)
    prepared = source.prepare(tmp_path / "model", tmp_path / "source")
    graph = prepared.frozen_graph()
    assert (rewrites.rewrite(graph) is not graph) == is_rewritten
    variant = Variant.parse("float32@litert")
    artifact = steps.convert(prepared, variant, tmp_path / "artifact", None, None, 1)
    values = np.random.default_rng(0).normal(size=(3, *shape[1:])).astype(np.float32)
    with load(artifact) as session:
        np.testing.assert_array_equal(session.run({"x": values})["y"], values[places])
