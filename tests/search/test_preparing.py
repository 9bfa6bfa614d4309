"""What is found out before the model is read."""

import pytest
import tensorflow as tf

import tfopt


def test_endless_data_is_refused_first(tmp_path):
    (tmp_path / "model.onnx").touch()  # not read yet
    data = tf.data.Dataset.from_tensors([1.0]).repeat()
    with pytest.raises(tfopt.InputError, match="never ends"):
        tfopt.optimize(tmp_path / "model.onnx", data, output_dir=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out" / "source").exists()
