"""The main job end to end, on the smallest golden models."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

import tfopt
from tests import goldens
from tfopt import dataset, isolation
from tfopt.artifact import Artifact
from tfopt.compare.comparison import COLUMNS, Comparison
from tfopt.errors import ConversionError
from tfopt.isolation import Worker
from tfopt.measure import latency
from tfopt.search.ledger import read_lines
from tfopt.search.optimize import Result

VARIANTS = ("float32@litert", "int8@litert", "dynamic_range@onnxruntime")
OF_ONNX = ("dynamic_range@onnxruntime", "int8@onnxruntime", "int8(calibration=entropy)@onnxruntime")
QUICK = {"num_threads": 1, "quiet": True, "max_timing_s": 0.3}


def _labelled(name: str, num_examples: int = 900):
    """A golden with labels that its live model gets right on nine of ten examples."""
    golden = goldens.GOLDENS[name]
    model = golden.build()
    inputs = golden.examples(num_examples, 3)
    key = next(iter(inputs))
    labels = np.asarray(model(inputs[key])).argmax(-1)
    random = np.random.default_rng(0)
    wrong = random.random(num_examples) < 0.1
    labels[wrong] = random.integers(0, labels.max() + 1, wrong.sum())
    return model, inputs[key], labels


@pytest.fixture(scope="session")
def conv(tmp_path_factory):
    """A SavedModel of the convolutional golden with labelled data."""
    folder = tmp_path_factory.mktemp("conv")
    model, images, labels = _labelled("conv")
    goldens.GOLDENS["conv"].save(model, str(folder / "model"))
    np.savez(folder / "data.npz", x=images, y=labels)
    return folder


@pytest.fixture(scope="session")
def onnx_file(conv):
    """The same model as an ONNX file: a search of it loads no TensorFlow and is quick."""
    return tfopt.convert(conv / "model", "float32@onnxruntime", conv / "onnx").folder / "model.onnx"


@pytest.fixture(scope="session")
def searched(conv, tmp_path_factory):
    """One finished search."""
    return tfopt.optimize(
        conv / "model",
        conv / "data.npz",
        tfopt.Budget(max_accuracy_drop=0.05),
        tmp_path_factory.mktemp("searched") / "out",
        variants=[*VARIANTS, "int16x8@litert"],
        **QUICK,
    )


def test_table_holds_every_variant_with_the_designed_columns(searched):
    table = searched.table
    assert tuple(table.columns) == COLUMNS
    assert set(table.variant) == {
        "float32@tensorflow",
        "float32(frozen=True)@tensorflow",
        "float32(xla=True)@tensorflow",
        *VARIANTS,
        "int16x8@litert",
    }
    assert list(table.variant[table.chosen]) == [str(searched.best.variant)]
    measured = table[table.status != "failed"]
    figures = [
        "median_ms",
        "speedup",
        "size_bytes",
        "accuracy",
        "cold_start_ms",
        "throughput_per_s",
    ]
    assert (measured[figures] > 0).all(axis=None)
    assert (measured.speedup_low <= measured.speedup).all()
    assert (measured.speedup <= measured.speedup_high).all()
    assert set(measured.verdict) <= {"faster", "slower", "no_difference"}


def test_cold_starts_are_those_of_new_processes(searched):
    """The first in the baseline's process was one; the others there are started once more."""
    records = read_lines(searched.output_dir / "ledger.jsonl")
    places = {
        (record["step"], record.get("variant")): place for place, record in enumerate(records)
    }
    last_tried = max(place for (step, _), place in places.items() if step == "measure")
    at_once = places["cold_start", "float32@tensorflow"]
    assert at_once == places["measure", "float32@tensorflow"] + 1
    for name in ("float32(frozen=True)@tensorflow", "float32(xla=True)@tensorflow"):
        assert places["cold_start", name] > last_tried
    for name in ("float32@litert", "int8@litert"):
        assert places["cold_start", name] < last_tried


def test_only_the_first_session_of_a_process_starts_cold(searched, conv, tmp_path):
    folders = [
        searched.output_dir / "artifacts" / name for name in ("float32@litert", "int8@litert")
    ]
    signature = Artifact.open(folders[0]).signature
    data = dataset.write(conv / "data.npz", signature, tmp_path)
    with Worker(tmp_path / "log", keeps_state=True) as worker:
        found = [
            worker.call(
                "tfopt.search.steps:open_session", folder, data, batch_size=1, num_threads=1
            ).is_first
            for folder in (*folders, folders[0])
        ]
    assert found == [True, False, True]


def test_accuracy_is_what_numpy_counts(searched, conv):
    with np.load(conv / "data.npz") as data:
        images, labels = data["x"], data["y"]
    assert searched.comparison.details["metric"] == "top1"
    chosen = np.random.default_rng(0).choice(len(images), 225, replace=False)
    rest = np.setdiff1d(np.arange(len(images)), chosen)
    predicted = np.asarray(goldens.GOLDENS["conv"].build()(images[rest])).argmax(-1)
    row = searched.table.set_index("variant").loc["float32@tensorflow"]
    assert row.accuracy == pytest.approx((predicted == labels[rest]).mean())


def test_chosen_variant_is_the_fastest_inside_the_budget(searched):
    table = searched.table
    inside = table[table.status == "ok"]
    chosen = table[table.chosen].iloc[0]
    assert chosen.speedup_high >= inside.speedup.max() * 0.8
    assert not (table[table.status == "ok"].accuracy_drop_high > 0.05).any()


def test_files_agree_with_the_result(searched):
    with (searched.output_dir / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["variant"] for row in rows] == list(searched.table.variant)
    again = tfopt.Comparison.from_files([searched.output_dir])
    pd.testing.assert_frame_equal(again.table, searched.table)
    report = (searched.output_dir / "report.html").read_text()
    assert all(name in report for name in VARIANTS)
    assert "http" not in report
    assert not (searched.output_dir / "data").exists()


def test_best_runs_by_itself(searched, conv):
    with np.load(conv / "data.npz") as data:
        images = data["x"][:1]
    with tfopt.load(searched.output_dir / "best") as session:
        assert set(session.run({"image": images})) == {"output_0"}
    with searched.load() as session, pytest.raises(tfopt.InputError, match="expected image"):
        session.run({"picture": images})


def test_best_warns_on_another_machine(searched, tmp_path):
    best = searched.best.copy_to(
        tmp_path / "moved", measured_on={**searched.best.measured_on, "cpu": "Another CPU"}
    )
    with pytest.warns(UserWarning, match="Another CPU then"):
        tfopt.load(best.folder).close()


def test_raw_times_are_kept(searched):
    finalists = searched.comparison.details["finalists"]
    name = "final" if "float32@litert" in finalists and len(finalists) > 1 else "float32@litert"
    value = json.loads((searched.output_dir / "timings" / f"{name}.json").read_text())
    timing = value["timings"]["float32@litert"]
    values = [x for block in timing["blocks_s"] for x in block]
    row = searched.table.set_index("variant").loc["float32@litert"]
    assert row.median_ms == pytest.approx(1e3 * np.median(values))
    assert len(timing["warm_up_s"]) > 0
    assert value["environment"]["versions"]["tensorflow"]


def _command(conv, onnx_file, out, *more):
    return [
        sys.executable, "-m", "tfopt", "optimize", f"--model={onnx_file}",
        f"--data={conv / 'data.npz'}", f"--output_dir={out}", "--num_threads=1",
        f"--variants={','.join(OF_ONNX)}", "--max_accuracy_drop=0.05", "--max_timing_s=0.3", *more,
    ]  # fmt: skip


def _wait_for_step(ledger, step, count, process):
    for _ in range(1200):
        if ledger.exists():
            records = [r for r in read_lines(ledger) if r["step"] == step]
            if len(records) >= count:
                return
        assert process.poll() is None, "ended before it could be stopped"
        time.sleep(0.1)
    pytest.fail("never got that far")


def test_resume_after_a_kill_repeats_no_finished_step(conv, onnx_file, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(_command(conv, onnx_file, out), start_new_session=True)
    _wait_for_step(out / "ledger.jsonl", "convert", 3, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = read_lines(out / "ledger.jsonl")
    made = {
        path: path.stat().st_mtime_ns for path in (out / "artifacts").glob("[!.]*/artifact.json")
    }
    done = subprocess.run(
        _command(conv, onnx_file, out, "--resume"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    after = read_lines(out / "ledger.jsonl")
    assert after[: len(before)] == before
    keys = [(record["step"], record.get("variant")) for record in after]
    assert len(keys) == len(set(keys)), "a step was done twice"
    assert made
    for path, changed in made.items():
        assert path.stat().st_mtime_ns == changed
    with (out / "results.csv").open() as file:
        rows = {row["variant"] for row in csv.DictReader(file)}
    assert rows == {"float32@onnxruntime", *OF_ONNX}

    other = tmp_path / "other.npz"
    with np.load(conv / "data.npz") as data:
        np.savez(other, x=data["x"], y=(data["y"] + 1) % 5)
    command = [f"--data={other}" if part.startswith("--data=") else part
               for part in _command(conv, onnx_file, out, "--resume", "--seed=7")]  # fmt: skip
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "data was" in refused.stderr
    assert "seed was 0 and is 7" in refused.stderr


def test_interrupt_ends_with_130_and_keeps_what_is_done(conv, onnx_file, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(_command(conv, onnx_file, out), stderr=subprocess.PIPE, text=True)
    _wait_for_step(out / "ledger.jsonl", "convert", 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run it again with resume" in errors
    assert "Traceback" not in errors
    assert (out / "ledger.jsonl").exists()


def test_nothing_within_the_limits_names_the_nearest(conv, onnx_file, tmp_path):
    result = tfopt.optimize(
        onnx_file,
        conv / "data.npz",
        tfopt.Budget(max_accuracy_drop=0.05, max_size_bytes=100),
        tmp_path / "out",
        variants=["int8@onnxruntime"],
        **QUICK,
    )
    assert result.best is None
    assert not (tmp_path / "out" / "best").exists()
    smallest = result.table.sort_values("size_bytes").variant.iloc[0]
    assert f"{smallest} is nearest" in result.summary
    assert set(result.table.status) == {"over_budget"}
    with pytest.raises(tfopt.ResultError, match="nearest"):
        result.load()


def test_too_few_examples_say_how_many_more_are_needed(conv, onnx_file, tmp_path):
    with np.load(conv / "data.npz") as data:
        few = {"x": data["x"][:60], "y": data["y"][:60]}
    result = tfopt.optimize(
        onnx_file, few, tfopt.Budget(0.01), tmp_path / "out",
        variants=["float32@openvino"], **QUICK,
    )  # fmt: skip
    row = result.table.set_index("variant").loc["float32@openvino"]
    assert row.status == "over_budget"
    assert "more examples would show" in row.reason
    # Without a discordant pair Tango's bound is z² / (n + z²) on the 45 evaluation examples.
    assert row.accuracy_drop_high == pytest.approx(1.6449**2 / (45 + 1.6449**2), rel=1e-3)
    assert str(result.best.variant) == "float32@onnxruntime", (
        "the unchanged model is a legal answer"
    )


def test_failures_are_rows_with_reasons(tmp_path):
    golden = goldens.GOLDENS["lstm"]
    result = tfopt.optimize(
        golden.build(), golden.examples(400, 0), tfopt.Budget(0.05), tmp_path / "out",
        variants=["int8@litert", "float32@onnxruntime", "bfloat16@tensorflow"],
        **QUICK,
    )  # fmt: skip
    table = result.table.set_index("variant")
    assert table.loc["int8@litert"].status == "failed"
    assert "loops" in table.loc["int8@litert"].reason
    assert table.loc["int8@litert"].isna().median_ms
    assert table.loc["float32@onnxruntime"].status == "ok"
    assert table.loc["float32@onnxruntime"].isna().accuracy, "there were no labels"
    assert table.loc["float32@onnxruntime"].isna().agreement, "its numbers are no decisions"
    assert table.loc["float32@onnxruntime"].accuracy_drop < 1e-5


def test_workers_that_grow_keep_their_sessions(conv, onnx_file, tmp_path, monkeypatch):
    """The converter is replaced after every step; who holds a session is not."""
    monkeypatch.setattr(isolation, "GROWTH_BYTES", 0)
    result = tfopt.optimize(
        onnx_file, conv / "data.npz", tfopt.Budget(max_accuracy_drop=1.0), tmp_path / "out",
        variants=["float32@onnxruntime", "dynamic_range@onnxruntime"], **QUICK,
    )  # fmt: skip
    assert result.table.status.tolist() == ["ok", "ok"]


def test_says_what_happens_inside(searched):
    rows = {row["variant"]: row for row in searched.comparison.rows}
    assert any("XNNPACK" in text for text in rows["int8@litert"]["diagnosis"])
    found = rows["dynamic_range@onnxruntime"]
    assert found["diagnosis"][0].startswith("Most of the time goes into")
    assert sum(layer["share"] for layer in found["layers"]) <= 1 + 1e-9
    assert "compute in float32" in " ".join(found["diagnosis"])
    report = (searched.output_dir / "report.html").read_text()
    assert report.count("<h4>Inside</h4>") >= 3


def test_what_cannot_be_looked_into_is_measured_all_the_same(
    onnx_file, conv, tmp_path, monkeypatch
):
    call = isolation.Worker.call

    def fail(worker, function, *args, **kwargs):
        if function.endswith(":diagnose"):
            raise ConversionError("The profiler ended the process.")
        return call(worker, function, *args, **kwargs)

    monkeypatch.setattr(isolation.Worker, "call", fail)
    result = tfopt.optimize(
        onnx_file, conv / "data.npz", tfopt.Budget(max_accuracy_drop=1.0), tmp_path / "out",
        variants=["dynamic_range@onnxruntime"], **QUICK,
    )  # fmt: skip
    assert result.table.status.tolist() == ["ok", "ok"]
    for row in result.comparison.rows:
        assert row["diagnosis"] == [
            "What happens inside could not be seen: The profiler ended the process."
        ]


@pytest.mark.parametrize("broken", ["float32(xla=True)@tensorflow", "float32@tensorflow"])
def test_unchanged_way_that_cannot_be_timed(broken, conv, tmp_path, monkeypatch):
    """Another way of running the model is a row; without the model itself there is no search."""
    time_interleaved = latency.time_interleaved

    def fail(sessions, **options):
        if broken in sessions:
            raise ConversionError("The process ended.")
        return time_interleaved(sessions, **options)

    monkeypatch.setattr(latency, "time_interleaved", fail)

    def search():
        return tfopt.optimize(
            conv / "model", conv / "data.npz", tfopt.Budget(max_accuracy_drop=1.0),
            tmp_path / "out", variants=["float32@litert"], **QUICK,
        )  # fmt: skip

    if broken == "float32@tensorflow":
        with pytest.raises(tfopt.ResultError, match=r"cannot be timed: The process ended\."):
            search()
        return
    table = search().table.set_index("variant")
    assert table.status.to_dict() == {
        "float32@tensorflow": "ok",
        "float32(frozen=True)@tensorflow": "ok",
        broken: "failed",
        "float32@litert": "ok",
    }
    assert "beside the other unchanged ways: The process ended." in table.reason[broken]


def test_tflite_files_are_their_own_baseline(conv, tmp_path):
    artifact = tfopt.convert(conv / "model", "float32@litert", tmp_path / "artifact")
    result = tfopt.optimize(
        artifact.folder / "model.tflite", conv / "data.npz", tfopt.Budget(0.05), tmp_path / "out",
        variants=["float32@openvino", "int8@onnxruntime"], **QUICK,
    )  # fmt: skip
    table = result.table.set_index("variant")
    assert result.comparison.details["baseline"] == "float32@litert"
    assert table.loc["float32@openvino"].status == "ok"
    assert table.loc["int8@onnxruntime"].status == "skipped"
    assert "cannot start from tflite" in table.loc["int8@onnxruntime"].reason


def test_callback_optimizes_at_the_end_of_training(tmp_path):
    import keras

    model, images, labels = _labelled("conv", 400)
    trained = keras.models.clone_model(model)
    trained.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    callback = tfopt.OptimizeCallback(
        (images, labels), tfopt.Budget(0.1), tmp_path / "out",
        variants=["float32@litert"], **QUICK,
    )  # fmt: skip
    stopping = keras.callbacks.EarlyStopping("loss", restore_best_weights=True)
    spoiling = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: epoch and trained.set_weights(
            [np.zeros_like(value) for value in trained.get_weights()]
        )
    )  # fmt: skip
    trained.fit(
        images, labels, epochs=2, verbose=0, callbacks=[spoiling, callback, stopping]
    )  # fmt: skip
    assert any(value.any() for value in trained.get_weights())
    row = callback.result.table.set_index("variant").loc["float32@tensorflow"]
    chosen = np.random.default_rng(0).choice(400, 100, replace=False)
    rest = np.setdiff1d(np.arange(400), chosen)
    predicted = trained.predict(images[rest], verbose=0).argmax(-1)
    assert row.accuracy == pytest.approx((predicted == labels[rest]).mean(), abs=0.004)


def test_tf_function_and_tf_keras_models_are_sources(tmp_path):
    import tensorflow as tf

    weights = tf.Variable(np.eye(3, dtype=np.float32) * 2)

    @tf.function(input_signature=[tf.TensorSpec((None, 3), tf.float32, name="vector")])
    def double(vector):
        return {"doubled": vector @ weights}

    artifact = tfopt.convert(double, "float32@litert", tmp_path / "function")
    with tfopt.load(artifact.folder) as session:
        outputs = session.run({"vector": np.ones((1, 3), np.float32)})
    np.testing.assert_allclose(outputs["doubled"], np.full((1, 3), 2.0))

    golden = goldens.GOLDENS["tf_keras_conv"]
    model, images = golden.build(), golden.examples(2, 0)["image"]
    artifact = tfopt.convert(model, "float32@onnxruntime", tmp_path / "tf_keras")
    with tfopt.load(artifact.folder) as session:
        outputs = session.run({"image": images})
    np.testing.assert_allclose(outputs["probabilities"], np.asarray(model(images)), atol=1e-5)


def test_notebooks_show_the_report_as_the_folder_was_given(tmp_path, monkeypatch):
    result = Result(tmp_path / "out", None, Comparison(()))
    assert f"<code>{tmp_path / 'out' / 'report.html'}</code>" in result._repr_html_()
    monkeypatch.chdir(tmp_path)
    assert "<code>out/report.html</code>" in result._repr_html_()
