"""Times and memory of the GPU in results, on a machine that only seems to have one.

`nvidia-smi` answers as on a real GPU. What runs is ONNX Runtime on the processor, and a module that
workers import lets its sessions tell times as those on a GPU do.
"""

import csv
import json
import textwrap

import numpy as np
import pytest

import tfopt
from tests import nvidia_smi
from tests.nvidia_smi import RTX_4080_UNDER_LOAD
from tfopt.isolation import Worker
from tfopt.measure import environment
from tfopt.search.ledger import read_lines

MIB = 1 << 20
QUICK = {"num_threads": 1, "quiet": True, "max_timing_s": 0.2}
BASELINE, CANDIDATE = "float32@onnxruntime", "dynamic_range@onnxruntime"
HELD = "Another process held the GPU while it was timed."
SLOWER = "The GPU's clock fell from 2805 to 2100 MHz while it was timed."


@pytest.fixture
def onnx_file(tmp_path):
    """A model of one matrix product."""
    import onnx

    weights = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 8])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 4])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    model.ir_version = 8
    onnx.save_model(model, tmp_path / "product.onnx")
    return tmp_path / "product.onnx"


@pytest.fixture
def data():
    return {"x": np.random.default_rng(1).standard_normal((400, 8)).astype(np.float32)}


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Options with which sessions tell times of a GPU: the body of `device_seconds`."""
    (tmp_path / "modules").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    environment.gpus.cache_clear()

    def options(body):
        (tmp_path / "modules" / "tells_times.py").write_text(
            "from tfopt.runtimes.onnxruntime import OnnxRuntimeSession\n"
            "def device_seconds(self, inputs, num_runs):\n"
            f"{textwrap.indent(textwrap.dedent(body), '    ')}\n"
            "OnnxRuntimeSession.device_seconds = device_seconds\n"
        )
        return {**QUICK, "import_modules": ["tells_times"]}

    yield options
    environment.gpus.cache_clear()


def search(onnx_file, data, out, options, **more):
    return tfopt.optimize(
        onnx_file, data, tfopt.Budget(1.0), out, variants=[CANDIDATE], **options, **more
    )


def test_search_records_times_memory_and_state(onnx_file, data, told, tmp_path, monkeypatch):
    nvidia_smi.install(
        tmp_path / "bin", monkeypatch, RTX_4080_UNDER_LOAD, processes=[("asking", "503 MiB")]
    )
    options = told("return [0.001 * (index + 1) for index in range(num_runs)]")
    result = search(onnx_file, data, tmp_path / "out", options)
    assert list(result.table.device_ms) == pytest.approx([25.5] * 2)  # of 50 runs, the most
    assert list(result.table.gpu_memory_bytes) == [503 * MIB] * 2
    assert not result.table.reason.str.contains("GPU").any()
    assert "without them the GPU takes 25.5 ms." in result.summary
    files = list((result.output_dir / "timings").iterdir())
    assert len(files) >= 2  # the pilot and the candidate; there may have been a final run
    for file in files:
        value = json.loads(file.read_text())
        assert set(value["device_seconds"]) == set(value["timings"])
        for times in value["device_seconds"].values():
            assert times == [0.001 * (index + 1) for index in range(50)]
        assert value["gpu_before"]["sm_clock_mhz"] == value["gpu_after"]["sm_clock_mhz"] == 2805
    report = (result.output_dir / "report.html").read_text()
    assert "The median contains the copies to the GPU and back" in report
    assert "<dt>ms without copies</dt><dd>25.500</dd>" in report
    assert "sm clock mhz: 2805" in report


def test_searches_before_it_was_measured_go_on(onnx_file, data, tmp_path):
    out = tmp_path / "out"
    before = search(onnx_file, data, out, QUICK).table
    assert before.device_ms.isna().all()
    assert before.gpu_memory_bytes.isna().all()
    new = {"device_ms", "notes", "gpu_memory_bytes"}

    def strip(value):
        if not isinstance(value, dict):
            return value
        return {name: strip(item) for name, item in value.items() if name not in new}

    lines = [strip(record) for record in read_lines(out / "ledger.jsonl")]
    (out / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    after = search(onnx_file, data, out, QUICK, resume=True).table
    assert list(after.variant) == list(before.variant)
    assert after.device_ms.isna().all()
    with (out / "results.csv").open() as file:
        assert {row["device_ms"] for row in csv.DictReader(file)} == {""}


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ("raise RuntimeError('no events')", "RuntimeError: no events"),
        ("import os; os.abort()", "The process was ended by SIGABRT"),
    ],
)
def test_a_failure_to_tell_times_is_a_note(
    failure, reason, onnx_file, data, told, tmp_path, monkeypatch
):
    nvidia_smi.install(tmp_path / "bin", monkeypatch, RTX_4080_UNDER_LOAD)
    result = search(onnx_file, data, tmp_path / "out", told(failure))
    assert list(result.table.status) == ["ok", "ok"]
    assert result.table.device_ms.isna().all()
    assert result.table.median_ms.notna().all()
    note = f"The time without copies was not measured: {reason}"
    assert result.table.reason.str.contains(note, regex=False).all()


class TestBenchmark:
    @pytest.fixture
    def artifacts(self, onnx_file, data, tmp_path):
        return [
            tfopt.convert(onnx_file, variant, tmp_path / variant, data).folder
            for variant in (BASELINE, "float32@openvino")
        ]

    def test_has_the_same_figures(self, artifacts, data, told, tmp_path, monkeypatch):
        hot = {**RTX_4080_UNDER_LOAD, "clocks.current.sm": "2100 MHz"}
        nvidia_smi.install(
            tmp_path / "bin", monkeypatch, RTX_4080_UNDER_LOAD, hot,
            processes=[("asking", "503 MiB"), (1, "25 MiB")],
        )  # fmt: skip
        options = {**told("return [0.002] * num_runs"), "max_timing_s": 0.2}
        del options["quiet"]
        comparison = tfopt.benchmark(artifacts, data, **options)
        table = comparison.table
        assert table.device_ms[0] == 2.0
        assert np.isnan(table.device_ms[1]), "OpenVINO runs on the processor"
        assert list(table.gpu_memory_bytes) == [503 * MIB] * 2  # for all the answers say
        assert table.reason[0] == f"{artifacts[0]} {HELD} {SLOWER}"
        details = comparison.details
        assert details["device_seconds"] == {str(artifacts[0]): [0.002] * 50}
        assert details["gpu_before"]["sm_clock_mhz"] == 2805
        assert details["gpu_after"]["sm_clock_mhz"] == 2100
        assert "median_ms contains the copies to the GPU and back" in comparison.summary

    def test_asks_for_nothing_without_a_gpu(self, artifacts, data, told, tmp_path, monkeypatch):
        options = told("raise RuntimeError('asked')")
        del options["quiet"]
        comparison = tfopt.benchmark(artifacts, data, **options)
        assert comparison.table.device_ms.isna().all()
        assert comparison.table.gpu_memory_bytes.isna().all()
        assert list(comparison.table.reason) == list(map(str, artifacts))
        assert comparison.details["gpu_before"] is None
        assert "GPU" not in comparison.summary

    def test_models_of_one_process_have_no_memory_of_their_own(
        self, artifacts, data, told, tmp_path, monkeypatch
    ):
        nvidia_smi.install(
            tmp_path / "bin", monkeypatch, RTX_4080_UNDER_LOAD, processes=[("asking", "503 MiB")]
        )
        copy = tfopt.Artifact.open(artifacts[0]).copy_to(tmp_path / "copy", measured_on=None)
        options = told("return None")
        del options["quiet"]
        comparison = tfopt.benchmark([artifacts[0], copy.folder], data, **options)
        assert comparison.table.gpu_memory_bytes.isna().all()
        assert comparison.details["device_seconds"] == {}


@pytest.mark.parametrize(("own", "expected"), [(None, "true"), ("false", "false")])
def test_workers_leave_memory_of_the_gpu_to_others(own, expected, tmp_path, monkeypatch):
    monkeypatch.delenv("TF_FORCE_GPU_ALLOW_GROWTH", raising=False)
    if own is not None:
        monkeypatch.setenv("TF_FORCE_GPU_ALLOW_GROWTH", own)
    with Worker(tmp_path / "log") as worker:
        assert worker.call("os:getenv", "TF_FORCE_GPU_ALLOW_GROWTH") == expected
