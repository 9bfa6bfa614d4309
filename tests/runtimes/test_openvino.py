"""What the conformance tests do not reach: processors without VNNI."""

import numpy as np
import onnx
import pytest
from onnx import helper

from tests.onnx import models
from tfopt import runtimes, source
from tfopt.artifact import Artifact
from tfopt.errors import ConversionError
from tfopt.measure import environment
from tfopt.runtimes.base import Conversion
from tfopt.search import steps
from tfopt.variant import Variant

pytest.importorskip("openvino")
pytest.importorskip("nncf")
RUNTIME = runtimes.get("openvino")


@pytest.mark.parametrize("has_vnni", [True, False])
def test_sums_of_extreme_values_do_not_saturate(has_vnni, tmp_path, monkeypatch):
    """Pairs of the largest weights and activations, whose sums pass 16 bits."""
    if has_vnni and not environment.has_vnni():
        pytest.skip("this processor has no VNNI")
    monkeypatch.setattr(environment, "has_vnni", lambda: has_vnni)
    generator = np.random.default_rng(0)
    weights = np.where(generator.random((64, 8)) < 0.9, 1, -1).astype(np.float32)
    x = generator.choice([1, 0.98, 0.02], (64, 64), p=[0.8, 0.15, 0.05]).astype(np.float32)
    x[::2] *= -1
    model = models.make(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weights}, ["n", 64], ["n", 8], 17
    )
    onnx.save_model(model, tmp_path / "model.onnx")
    prepared = source.prepare(tmp_path / "model.onnx", tmp_path / "source")
    parent = None
    for text in ("float32@openvino", "int8@openvino"):
        variant = Variant.parse(text)
        (tmp_path / variant.slug).mkdir()
        conversion = Conversion(
            source=prepared,
            folder=tmp_path / variant.slug,
            parent=parent,
            batch_size=8,
            calibration=lambda: iter([{"x": x[i : i + 8]} for i in range(0, 64, 8)]),
            notes=[],
            signature=prepared.signature,
            num_calibration=64,
        )
        RUNTIME.convert(variant, conversion)
        parent = Artifact(
            conversion.folder, variant, None, prepared.sha256, conversion.signature, 0, 0, {},
            tuple(conversion.notes), needs=tuple(conversion.needs),
        )  # fmt: skip
    assert parent.needs == (("vnni",) if has_vnni else ())
    with RUNTIME.load(parent, 1) as session:
        (found,) = session.run({"x": x}).values()
    assert np.abs(found - x @ weights).max() < 0.02 * np.abs(x @ weights).max()


def test_refused_operations_are_named(tmp_path):
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec((1, 8, 1, 4), name="boxes")])
    def serve(boxes):
        scores = tf.reduce_mean(boxes, -1)
        return tf.image.combined_non_max_suppression(boxes, scores, 2, 4)._asdict()

    module = tf.Module()
    module.serve = serve
    tf.saved_model.save(module, str(tmp_path / "model"), signatures=serve)
    prepared = source.prepare(tmp_path / "model", tmp_path / "source")
    with pytest.raises(
        ConversionError, match=r"no conversion for CombinedNonMaxSuppression\. Another runtime may"
    ):
        steps.convert(prepared, Variant.parse("float32@openvino"), tmp_path / "a", None, None, 1)
