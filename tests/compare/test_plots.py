import json

import matplotlib
import numpy as np
import pytest

from tests.compare.test_report import FOUR
from tfopt.compare.comparison import Comparison
from tfopt.errors import InputError
from tfopt.measure.latency import Timing

matplotlib.use("Agg")
from matplotlib import pyplot


@pytest.fixture(autouse=True)
def close_figures():
    yield
    pyplot.close("all")


def labels(ax):
    return ax.get_legend_handles_labels()[1]


def points(ax):
    """Places of all markers, without lines and bars."""
    found = [line.get_xydata() for line in ax.lines if line.get_marker() not in ("None", "", "|")]
    return {tuple(point) for data in found for point in np.asarray(data).tolist()}


class TestPareto:
    def test_a_point_for_each_measured_variant(self):
        ax = FOUR.plot_pareto()
        measured = [row for row in FOUR.rows if row["status"] in ("ok", "over_budget")]
        expected = {(row["speedup"], row["accuracy"]) for row in measured}
        assert expected <= points(ax)
        assert labels(ax) == ["litert", "onnxruntime, over budget", "tensorflow"]
        assert ax.get_xlabel() == "times as fast as the baseline"
        assert ax.get_ylabel() == "accuracy"
        # What nothing beats has its name.
        assert {text.get_text() for text in ax.texts} == {
            "int8@litert", "float32(xla=True)@tensorflow",
        }  # fmt: skip

    def test_draws_into_what_is_given(self):
        _, ax = pyplot.subplots()
        assert FOUR.plot_pareto(ax) is ax
        assert len(pyplot.get_fignums()) == 1

    def test_without_accuracy_it_is_agreement(self):
        rows = tuple({**row, "accuracy": None} for row in FOUR.rows)
        assert Comparison(rows).plot_pareto().get_ylabel() == "agreement with the model as saved"

    def test_wide_ranges_are_logarithmic(self):
        assert FOUR.plot_pareto().get_xscale() == "linear"
        rows = tuple(
            {**row, "speedup": row["speedup"] and row["speedup"] ** 2} for row in FOUR.rows
        )
        assert Comparison(rows).plot_pareto().get_xscale() == "log"

    def test_nothing_to_plot(self):
        with pytest.raises(InputError, match="No row has speedup and"):
            Comparison((FOUR.rows[2],)).plot_pareto()


class TestTradeoff:
    def test_any_two_figures(self):
        ax = FOUR.plot_tradeoff("size_bytes", "cold_start_ms")
        assert (317_000, 812.25) in points(ax)
        assert ax.get_xlabel() == "size (bytes)"

    def test_unknown_column(self):
        with pytest.raises(InputError, match="speed is no column with figures"):
            FOUR.plot_tradeoff("speed")


def timing(median_s, count):
    values = np.random.default_rng(0).lognormal(np.log(median_s), 0.1, count).tolist()
    return Timing([1.0], [1], [values])


@pytest.fixture
def timed(tmp_path):
    """Results with raw times: one variant's in a file of its own, as a search leaves them."""
    timings = {"a@litert": timing(0.002, 700), "b@litert": timing(0.001, 50)}
    (tmp_path / "timings").mkdir()
    content = {"timings": {"b@litert": timings["b@litert"].to_json()}}
    (tmp_path / "timings" / "final.json").write_text(json.dumps(content))
    rows = [
        {**FOUR.rows[0], "variant": "a@litert", "timing": {"file": None, "key": "a@litert"}},
        {**FOUR.rows[0], "variant": "b@litert",
         "timing": {"file": "timings/final.json", "key": "b@litert"}},
        FOUR.rows[2],
    ]  # fmt: skip
    details = {"timings": {"a@litert": timings["a@litert"].to_json()}}
    Comparison(tuple(rows), details).save_json(tmp_path / "results.json")
    return Comparison.from_files([tmp_path]), timings


class TestLatency:
    def test_raw_times_are_read_from_wherever_they_lie(self, timed):
        comparison, timings = timed
        assert comparison.timings() == timings

    def test_one_violin_a_variant_the_fastest_on_top(self, timed):
        comparison, timings = timed
        ax = comparison.plot_latency()
        assert [text.get_text() for text in ax.get_yticklabels()] == ["b@litert", "a@litert"]
        assert ax.get_yticks().tolist() == [2, 1]
        assert len(ax.collections) == 2
        for name, place in (("b@litert", 2), ("a@litert", 1)):
            median = np.median(timings[name].values_s) * 1e3
            assert any(point == pytest.approx((median, place)) for point in points(ax))
        # p90 and p99 of 700 calls; 50 calls carry neither.
        ticks = [line for line in ax.lines if line.get_marker() == "None"]
        expected = [np.percentile(timings["a@litert"].values_s, q) * 1e3 for q in (90, 99)]
        assert [line.get_xdata()[0] for line in ticks] == pytest.approx(expected)

    def test_chosen_variants(self, timed):
        ax = timed[0].plot_latency(["a@litert"])
        assert [text.get_text() for text in ax.get_yticklabels()] == ["a@litert"]
        with pytest.raises(InputError, match=r"No raw times of c; there are: a@litert, b@litert"):
            timed[0].plot_latency(["c"])

    def test_without_raw_times(self, timed, tmp_path):
        with pytest.raises(InputError, match="hold no raw times"):
            FOUR.plot_latency()
        (tmp_path / "timings" / "final.json").unlink()
        with pytest.raises(InputError, match=r"raw times of b@litert are missing or damaged"):
            timed[0].timings()
