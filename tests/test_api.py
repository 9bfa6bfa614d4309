import numpy as np
import pytest

import tfopt
from tests import goldens


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The dense golden: its SavedModel, its examples, and two artifacts."""
    folder = tmp_path_factory.mktemp("dense")
    golden = goldens.GOLDENS["dense"]
    goldens.export(golden, folder / "model")
    examples = golden.examples(64, 0)
    for variant in ("float32@litert", "int8@litert"):
        tfopt.convert(folder / "model", variant, folder / variant, examples)
    return folder, examples


def test_converted_artifact_runs_and_describes_itself(dense):
    folder, examples = dense
    artifact = tfopt.Artifact.open(folder / "int8@litert")
    assert str(artifact.variant) == "int8@litert"
    assert artifact.size_bytes == (folder / "int8@litert" / "model.tflite").stat().st_size
    assert artifact.versions["ai-edge-litert"]
    with tfopt.load(artifact.folder, num_threads=1) as session:
        outputs = session.run({"features": examples["features"][:5]})
    live = goldens.GOLDENS["dense"].build()(examples["features"][:5])
    np.testing.assert_allclose(outputs["output_0"], live, atol=0.05)


def test_nothing_is_left_beside_the_artifact(dense):
    folder, _ = dense
    assert {path.name for path in folder.iterdir()} == {"model", "float32@litert", "int8@litert"}


@pytest.mark.parametrize("variant", ["float32@tensorflow", "float32@litert", "float32@onnxruntime"])
def test_wrong_inputs_are_told_what_fits(dense, tmp_path, variant):
    folder, examples = dense
    artifact = tfopt.convert(folder / "model", variant, tmp_path / "artifact")
    with tfopt.load(artifact.folder) as session:
        for wrong in (
            {"other": examples["features"][:1]},
            {"features": examples["features"][:1].astype(np.int64)},
            {"features": examples["features"][:1, :3]},
            {},
        ):
            with pytest.raises(tfopt.InputError, match=r"expected features float32 \(\?, 16\)"):
                session.run(wrong)
        session.run({"features": examples["features"][:1]})


def test_convert_never_overwrites(dense):
    folder, _ = dense
    before = (folder / "float32@litert" / "artifact.json").read_bytes()
    with pytest.raises(tfopt.InputError, match="exists already"):
        tfopt.convert(folder / "model", "int8@litert", folder / "float32@litert")
    assert (folder / "float32@litert" / "artifact.json").read_bytes() == before


def test_convert_says_why_it_cannot(dense, tmp_path):
    folder, _ = dense
    with pytest.raises(tfopt.ResultError, match="calibrated on real examples"):
        tfopt.convert(folder / "model", "int8@litert", tmp_path / "out")
    with pytest.raises(tfopt.InputError, match="name one"):
        tfopt.convert(folder / "model", "*@litert", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_benchmark_times_artifacts_side_by_side(dense, tmp_path):
    folder, examples = dense
    artifacts = [folder / "float32@litert", folder / "int8@litert"]
    comparison = tfopt.benchmark(artifacts, examples, num_threads=1)
    table = comparison.table
    assert list(table.variant) == ["float32@litert", "int8@litert"]
    assert table.speedup[0] == 1.0
    assert table.speedup_low[1] <= table.speedup[1] <= table.speedup_high[1]
    raw = comparison.details["timings"][str(artifacts[1])]["blocks_s"]
    assert table.median_ms[1] == pytest.approx(1e3 * np.median(np.concatenate(raw)))
    comparison.save_json(tmp_path / "results.json")
    again = tfopt.Comparison.from_files([tmp_path / "results.json"])
    assert list(again.table.median_ms) == list(table.median_ms)
    with pytest.raises(tfopt.InputError, match="stands twice"):
        tfopt.benchmark([artifacts[0], artifacts[0]], examples)
    with pytest.raises(tfopt.InputError, match="No artifact in"):
        tfopt.benchmark([tmp_path], examples)


def test_benchmark_puts_artifacts_under_load(dense, tmp_path):
    folder, examples = dense
    comparison = tfopt.benchmark(
        [folder / "float32@litert"], examples, num_threads=2, max_timing_s=0.2,
        concurrency=[1, 2], arrival_rates_per_s=[200], load_batch_sizes=[1, 4], load_s=0.3,
    )  # fmt: skip
    loads = comparison.loads
    assert len(loads) == 2 * 2 * 2
    assert set(loads.variant) == {"float32@litert"}
    closed = loads[loads.arrival_rate_per_s.isna()]
    assert (loads.num_unanswered == 0).all()
    assert (loads.median_ms > 0).all()
    # Far more can be answered than arrives.
    opened = loads[loads.arrival_rate_per_s == 200]
    assert (opened.throughput_per_s / opened.batch_size).between(100, 400).all()
    assert (closed.throughput_per_s / closed.batch_size > 400).all()
    raw = comparison.details["loads"][0]["latencies_s"]
    assert closed.median_ms.iloc[0] == pytest.approx(1e3 * np.median(raw), abs=1e-4)  # raw: 0.1 µs
    comparison.save_json(tmp_path / "results.json")
    again = tfopt.Comparison.from_files([tmp_path / "results.json"])
    assert again.loads.equals(loads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concurrency": [0]}, r"concurrency is \[0\].*at least 1"),
        ({"concurrency": [1], "load_batch_sizes": [1.5]}, r"load_batch_sizes \[1.5\]"),
        ({"arrival_rates_per_s": [5]}, "give concurrency"),
        ({"max_timing_s": -1}, "max_timing_s is -1; expected 0 or more"),
    ],
)
def test_benchmark_refuses(options, message, dense):
    folder, examples = dense
    with pytest.raises(tfopt.InputError, match=message):
        tfopt.benchmark([folder / "float32@litert"], examples, **options)


def test_two_runs_of_the_same_artifacts_show_no_regression(dense):
    folder, examples = dense
    artifacts = [folder / "float32@litert", folder / "int8@litert"]
    before, after = (
        tfopt.benchmark(artifacts, examples, num_threads=1, max_timing_s=1) for _ in range(2)
    )
    found = after.regressions(before, slower=0.5)
    assert found.variant.tolist() == ["float32@litert", "int8@litert"]
    assert "regression" not in set(found.verdict)
    assert len(after.timings()) == 2


def test_inspect_counts_parameters_as_keras_does(dense):
    folder, _ = dense
    found = tfopt.inspect(folder / "model")
    expected = goldens.GOLDENS["dense"].build().count_params()
    assert found.num_parameters == expected
    assert found.duplicated_bytes == 4 * expected, "Keras 3 exports hold every weight twice"
    assert found.ops["MatMul"] == 3
    assert "serving_default" in found.signatures
    assert "features float32 (?, 16)" in str(found)
    lite = tfopt.inspect(folder / "float32@litert" / "model.tflite")
    assert lite.kind == "tflite"
    assert lite.ops["FULLY_CONNECTED"] == 3
    assert lite.num_parameters == expected


def test_inspect_takes_live_models():
    model = goldens.GOLDENS["conv"].build()
    found = tfopt.inspect(model)
    trainable = sum(int(np.prod(w.shape)) for w in model.weights)
    assert 0.9 * trainable < found.num_parameters <= trainable
    assert found.layers[0][1] == max(count for _, count in found.layers)


def test_calibration_examples_that_are_not_finite_are_noted(dense, tmp_path):
    folder, examples = dense
    examples = {"features": np.tile(examples["features"], (4, 1))}  # a tenth calibrates
    examples["features"][np.random.default_rng(0).random(256) < 0.5, 0] = np.nan
    notes = {
        variant: tfopt.convert(folder / "model", variant, tmp_path / variant, examples).notes
        for variant in ("int8@litert", "float32@litert")
    }
    noted = [note for note in notes["int8@litert"] if note.startswith("Calibration leaves out ")]
    assert len(noted) == 1
    assert not any("NaN" in note for note in notes["float32@litert"])
