import pathlib
import shutil
import struct

import pytest

from tfopt.trt import converted
from tfopt.trt.converted import Converted, Segment


def write_saved_model(folder, functions):
    """A SavedModel of functions, each a list of (name, operation, segment's function or None)."""
    from tensorflow.core.protobuf import saved_model_pb2

    model = saved_model_pb2.SavedModel()
    library = model.meta_graphs.add().graph_def.library
    for name, nodes in functions.items():
        function = library.function.add()
        function.signature.name = name
        for node_name, op, segment in nodes:
            node = function.node_def.add(name=node_name, op=op)
            if segment is not None:
                node.attr["segment_func"].func.name = segment
    folder.mkdir()
    (folder / "saved_model.pb").write_bytes(model.SerializeToString())
    (folder / "assets").mkdir()


def write_records(file, sizes):
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(file)) as writer:
        for size in sizes:
            writer.write(b"x" * size)


@pytest.fixture
def folder(tmp_path):
    """Two parts: one with an engine of five operations, one whose engine could not be built."""
    inside = [(f"conv_{index}", "Conv2D", None) for index in range(4)]
    write_saved_model(
        tmp_path / "model",
        {
            "signature_wrapper": [("call", "StatefulPartitionedCall", None)],
            "main": [
                ("TRTEngineOp_000_000", "TRTEngineOp", "TRTEngineOp_000_000_native_segment"),
                ("scope/TRTEngineOp_000_001", "TRTEngineOp", "TRTEngineOp_000_001_native_segment"),
                ("weights", "Const", None),
                ("sort", "TopKV2", None),
                ("gamma", "Igamma", None),
                ("other", "TopKV2", None),
                ("hand_on", "Identity", None),
            ],
            "TRTEngineOp_000_000_native_segment": [*inside, ("relu", "Relu", None),
                                                   ("w", "Const", None)],
            "TRTEngineOp_000_001_native_segment": inside[:2],
        },
    )  # fmt: skip
    write_records(tmp_path / "model/assets/trt-serialized-engine.TRTEngineOp_000_000", [100, 20])
    write_records(tmp_path / "model/assets/trt-serialized-engine.TRTEngineOp_000_001", [])
    return tmp_path / "model"


def test_engines_are_counted_in_the_function_library(folder):
    found = converted.read(folder)
    assert found.segments == (
        Segment("TRTEngineOp_000_000", 5, 2, 120),
        Segment("TRTEngineOp_000_001", 2, 0, 0),
    )
    assert found.num_engines == 2
    assert sorted(op for _, op in found.left) == ["Igamma", "TopKV2", "TopKV2"]
    assert found.share_inside == 5 / 10  # what has no engine runs in TensorFlow


def test_a_real_one(tmp_path):
    """Of TensorFlow 2.17.1 with TensorRT 8.6: two convolutions around a sort and an igamma."""
    real = pathlib.Path(__file__).parent / "saved_models/two_engines.pb"
    shutil.copy(real, tmp_path / "saved_model.pb")
    (tmp_path / "assets").mkdir()
    for index, size in enumerate((112042, 178922)):
        write_records(tmp_path / f"assets/trt-serialized-engine.TRTEngineOp_004_00{index}", [size])
    found = converted.read(tmp_path)
    assert [(s.num_nodes, s.num_engines, s.num_bytes, s.has_ranges) for s in found.segments] == [
        (5, 1, 112042, False), (4, 1, 178922, False)
    ]  # fmt: skip
    assert sorted(op for _, op in found.left) == ["AddV2", "Igamma", "Neg", "TopKV2"]
    assert found.describe({}).startswith("2 TensorRT engines hold 69% of the operations; ")


def test_what_is_not_converted_has_no_engines(tmp_path):
    write_saved_model(tmp_path / "model", {"main": [("conv", "Conv2D", None)]})
    assert converted.read(tmp_path / "model") == Converted((), ())
    assert Converted((), ()).share_inside == 0


def test_the_sentence_says_what_stayed_and_why(folder):
    text = converted.read(folder).describe({"Igamma": ["not supported", "seldom"]})
    assert text == (
        "2 TensorRT engines hold 50% of the operations; in TensorFlow stayed 2 TopKV2, 1 Igamma "
        "(not supported)."
    )
    whole = Converted((Segment("a", 7, 1, 10),), ())
    assert whole.describe({}) == "1 TensorRT engine holds 100% of the operations."


def test_records_are_measured_without_reading_them(tmp_path):
    write_records(tmp_path / "file", [0, 7, 123456])
    assert list(converted.record_sizes(tmp_path / "file")) == [0, 7, 123456]
    with (tmp_path / "file").open("rb") as file:
        assert struct.unpack("<Q", file.read(8)) == (0,)


# As TensorFlow 2.17.1 wrote it for a small network; a reason may hold bars itself.
REPORT = """OP Name|Reason|Count
AddV2|Infeasible broadcast scheme (batch_dim: -1, nvinfer1::Dims(nbDims=3, d=16,16,32,))|1
Igamma|implicit batch mode requires input shape with at least two dimensions|1
NoOp|Op type NoOp is not supported.|2
Odd|one | two|3
Odd|rare|1
"""


def test_reasons_are_read_from_tensorflows_report(tmp_path):
    file = tmp_path / "report.csv"
    file.write_text(REPORT)
    found = converted.read_reasons(file)
    assert found["Igamma"] == [
        "implicit batch mode requires input shape with at least two dimensions"
    ]
    assert found["NoOp"] == ["Op type NoOp is not supported"]
    assert found["Odd"] == ["one | two", "rare"]
    assert found["AddV2"][0].startswith("Infeasible broadcast scheme (batch_dim: -1, nvinfer1")
    assert converted.read_reasons(tmp_path / "none") == {}
