from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tfopt.trt import trtexec_log
from tfopt.trt.trtexec_log import Times

LOGS = Path(__file__).parent / "logs"
NAMES = sorted(path.name for path in LOGS.glob("*.log"))


def log(name):
    return trtexec_log.parse((LOGS / name).read_text())


def test_log_of_a_built_engine():
    found = log("10.9_passed.log")
    assert found.is_passed is True and found.reason is None
    assert found.version == "10.9.0"
    assert found.gpu == "NVIDIA GeForce RTX 3070" and found.compute_capability == "8.6"
    assert found.build_seconds == 104.774
    assert found.engine_bytes == round(231.019 * 2**20)
    assert found.device_memory_bytes == round(446.209 * 2**20)
    assert found.throughput_per_s == 8.66824
    assert found.latency == Times(112.567, {90: 114.427, 95: 115.415, 99: 115.703})
    assert found.gpu_compute == Times(111.208, {90: 113.02, 95: 114.115, 99: 114.185})
    assert found.host_to_device.median_ms == 0.769043
    assert found.device_to_host.median_ms == 0.609924
    assert found.errors == () and len(found.warnings) == 5


def test_log_with_one_percentile():
    found = log("8.4_passed.log")
    assert found.is_passed is True and found.version == "8.4.0"
    assert found.throughput_per_s == 41087.7
    assert found.latency == Times(0.401947, {99: 0.420288})
    assert found.gpu_compute == Times(0.388443, {99: 0.393188})
    assert found.host_to_device == Times(0.00952148, {99: 0.0272217})
    assert found.build_seconds is None and found.gpu is None


def test_log_that_was_cut_off():
    found = log("8.6_timed.log")
    assert found.is_passed is None and found.reason is None
    assert found.version == "8.6.3"
    assert found.gpu == "NVIDIA GeForce RTX 2080" and found.compute_capability == "7.5"
    assert found.gpu_compute.median_ms == 197.253
    assert found.latency is None


def test_log_with_times_under_titles():
    found = log("7_host_latency.log")
    assert found.latency == Times(1.65601, {99: 1.67065})  # not that from end to end
    assert found.throughput_per_s is None  # it says 0
    assert found.gpu_compute is None
    assert log("7_gpu_compute.log").gpu_compute == Times(567.073, {})  # not that of enqueueing


def test_log_of_an_unknown_operator_inside_a_branch():
    found = log("8.0_unknown_operator.log")
    assert found.is_passed is False and found.version == "8.0.3"
    assert not found.is_out_of_memory
    assert found.reason == (
        "TensorRT has no operator Round, at node 12 (If, which makes "
        "StatefulPartitionedCall/Preprocessor/ResizeToRange/cond:0)"
    )


def test_log_of_a_node_that_cannot_be_computed():
    found = log("10.3_shape_tensor.log")
    assert found.is_passed is False
    assert "/OneHot: an IIOneHotLayer cannot be used to compute a shape tensor" in found.reason
    assert found.reason.endswith(", at node 146 (Tile, which makes /Tile_output_0)")


def test_log_without_memory():
    found = log("10.3_out_of_memory.log")
    assert found.is_out_of_memory and found.reason == "the GPU has no memory left"


def test_log_of_tactics_that_were_skipped_for_their_memory():
    found = log("10_skipped_tactic.log")
    assert not found.is_out_of_memory and found.reason is None
    assert found.build_seconds == 273.506 and found.engine_bytes == round(34.271 * 2**20)
    assert len(found.warnings) == 1


def test_log_of_the_loader():
    found = trtexec_log.parse(
        "trtexec: error while loading shared libraries: libnvinfer.so.10: cannot open shared "
        "object file: No such file or directory\n"
    )
    assert "libnvinfer.so.10" in found.reason


@given(
    st.sampled_from(NAMES),
    st.lists(st.tuples(st.integers(0, 100), st.text(max_size=60)), max_size=8),
)
def test_other_lines_between_change_nothing(name, others):
    lines = (LOGS / name).read_text().splitlines()
    for place, text in others:
        for line in text.splitlines():
            if not line.lstrip().startswith(("[", "&&&&")):
                lines.insert(place * len(lines) // 100, line)
    assert trtexec_log.parse("\n".join(lines)) == log(name)


@given(st.text())
def test_any_text_is_a_log(text):
    trtexec_log.parse(text)
