import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tfopt.artifact import Artifact
from tfopt.errors import InputError
from tfopt.examples import LABELS, Examples, ExampleWriter
from tfopt.measure import accuracy, scores, statistics
from tfopt.measure.comparing import Reference
from tfopt.measure.fidelity import Fidelity
from tfopt.measure.metrics import METRICS
from tfopt.measure.scores import ALL_OUTPUTS
from tfopt.runtimes.base import Session
from tfopt.signature import Signature, TensorSpec
from tfopt.variant import Variant


class NumPySession(Session):
    """A model that is a NumPy function of its input `x`."""

    def __init__(self, function, input_shape=(None, 3), num_outputs=1):
        names = [f"out{index}" for index in range(num_outputs)]
        signature = Signature(
            "serving_default",
            (TensorSpec("x", input_shape, "float32"),),
            tuple(TensorSpec(name, None, "float32") for name in names),
        )
        variant = Variant("float32", "numpy")
        super().__init__(Artifact(Path(), variant, None, "", signature, 0, 0, {}))
        self._function = function
        self.batch_sizes = []

    def run(self, inputs):
        self.batch_sizes.append(len(inputs["x"]) if inputs["x"].ndim else None)
        found = self._function(inputs["x"])
        return found if isinstance(found, dict) else {"out0": found}

    def close(self):
        pass


def examples_of(folder, x, labels=None):
    with ExampleWriter(folder) as writer:
        columns = {"x": np.asarray(x, np.float32)}
        writer.append(columns if labels is None else {**columns, LABELS: np.asarray(labels)})
    return Examples(folder)


def evaluate(function, examples, metric, folder=None, *, output="out0", batch_size=4, **session):
    """Evaluates; with a folder it is the reference that is written there, or compared with it."""
    is_reference = folder is None or not (folder / "index.json").exists()
    return accuracy.evaluate(
        NumPySession(function, **session),
        examples,
        metrics={} if metric == "agreement" else {output: metric},
        output_name=None if output == ALL_OUTPUTS else output,
        batch_size=batch_size,
        reference=None if is_reference else Reference.open(folder),
        write_reference=folder if is_reference else None,
    )


def scores_of(evaluation):
    (found,) = evaluation.scores.values()
    return found


def drop_of(both):
    return accuracy.accuracy_drops(*both)[0].interval


def evaluate_both(tmp_path, x, labels, metric, baseline, candidate, **options):
    examples = examples_of(tmp_path / "examples", x, labels)
    return tuple(
        evaluate(function, examples, metric, tmp_path / "reference", **options)
        for function in (baseline, candidate)
    )


@pytest.fixture
def own_metrics(tmp_path, monkeypatch):
    """Makes a module of metrics importable and returns its name."""
    (tmp_path / "own_metrics.py").write_text(OWN_METRICS)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_metrics"


OWN_METRICS = """
import numpy as np

def distance(outputs, labels):
    return np.abs(outputs[:, 0] - labels)
distance.higher_is_better = False

def is_wrong(outputs, labels):
    return outputs.argmax(1) != labels
is_wrong.higher_is_better = False

def mean_of_both(outputs, labels):
    return outputs["out0"][:, 0] + outputs["out1"][:, 0]

def share_above(outputs, labels):
    return float(np.mean(outputs[:, 0] > labels))

def largest_error(outputs, labels):
    return float(np.max(np.abs(outputs[:, 0] - labels)))
largest_error.higher_is_better = False

def of_positives_only(outputs, labels):
    return float(np.mean(outputs[labels == 1, 0]))

def needs_both_classes(outputs, labels):
    if set(labels) != {0, 1}:
        raise ValueError("only one class")
    return float(np.mean(outputs[labels == 1, 0]) - np.mean(outputs[labels == 0, 0]))

def two_numbers(outputs, labels):
    return np.zeros((len(labels), 2))
"""


def first_columns(x):
    return x[:, :2]


class TestEvaluate:
    @pytest.mark.parametrize("batch_size", [1, 4, 10, 64])
    @pytest.mark.parametrize("metric", ["top1", "top5", "mse", "mae"])
    def test_scores_do_not_depend_on_batches(self, metric, batch_size, tmp_path):
        x = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
        labels = x[:, ::-1] if metric.startswith("m") else np.arange(10) % 3
        examples = examples_of(tmp_path, x, labels)
        found = evaluate(np.abs, examples, metric, batch_size=batch_size)
        expected = METRICS[metric].score(np.abs(x), labels)
        np.testing.assert_allclose(scores_of(found).scores, expected)
        assert scores_of(found).value == pytest.approx(expected.mean())
        assert (scores_of(found).metric, scores_of(found).level) == (metric, "example")
        assert scores_of(found).higher_is_better == metric.startswith("top")
        assert found.lost == {} and found.fidelity == {}

    def test_auc_by_pairs(self, tmp_path):
        generator = np.random.default_rng(0)
        x, labels = generator.integers(-3, 4, size=(40, 1)), generator.integers(2, size=40)
        found = evaluate(lambda x: x * 2, examples_of(tmp_path, x, labels[:, None]), "auc",
                         input_shape=(None, 1))  # fmt: skip
        pairs = [(a > b) + 0.5 * (a == b) for a in x[labels == 1, 0] for b in x[labels == 0, 0]]
        assert scores_of(found).value == pytest.approx(np.mean(pairs))
        np.testing.assert_array_equal(scores_of(found).labels, labels)
        np.testing.assert_array_equal(scores_of(found).scores, 2 * x[:, 0])

    @pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1], [0, 1, 2]])
    def test_auc_needs_two_classes(self, labels, tmp_path):
        with pytest.raises(InputError, match="AUC needs labels of two classes, both"):
            evaluate(np.abs, examples_of(tmp_path, np.ones((3, 1)), labels), "auc")

    def test_custom_metric_per_example(self, own_metrics, tmp_path):
        x = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
        examples = examples_of(tmp_path / "x", x, np.arange(10))
        found = evaluate(np.exp, examples, f"{own_metrics}:distance")
        np.testing.assert_allclose(scores_of(found).scores, np.abs(np.exp(x[:, 0]) - np.arange(10)))
        assert (scores_of(found).level, scores_of(found).higher_is_better) == ("example", False)

    def test_custom_metric_gets_all_outputs(self, own_metrics, tmp_path):
        x = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
        found = evaluate(
            lambda x: {"out0": x, "out1": 10 * x},
            examples_of(tmp_path / "x", x, np.arange(10)),
            f"{own_metrics}:mean_of_both",
            output=ALL_OUTPUTS,
            num_outputs=2,
        )
        np.testing.assert_allclose(scores_of(found).scores, 11 * x[:, 0], rtol=1e-6)

    def test_custom_metric_of_the_set(self, own_metrics, tmp_path):
        x = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
        labels = np.random.default_rng(1).normal(size=10)
        found = evaluate(np.abs, examples_of(tmp_path / "x", x, labels),
                         f"{own_metrics}:share_above")  # fmt: skip
        assert scores_of(found).value == pytest.approx(np.mean(np.abs(x[:, 0]) > labels))
        assert (scores_of(found).level, scores_of(found).higher_is_better) == ("set", True)
        assert scores_of(found).resampled.shape == (200,)

    def test_custom_metric_of_the_set_that_refuses_a_part_of_it(self, own_metrics, tmp_path):
        """As scikit-learn's ROC AUC does when a batch holds one class only."""
        x, labels = np.random.default_rng(0).normal(size=(20, 3)), np.repeat([0, 1], 10)
        name = f"{own_metrics}:needs_both_classes"
        found = evaluate(lambda x: x, examples_of(tmp_path / "a", x, labels), name)
        x = x.astype(np.float32)
        assert scores_of(found).value == pytest.approx(x[10:, 0].mean() - x[:10, 0].mean())
        message = r"needs_both_classes fails on outputs of shape \(20, 3\).*only one class"
        with pytest.raises(InputError, match=message):
            evaluate(lambda x: x, examples_of(tmp_path / "b", x, labels * 0), name)

    def test_custom_metric_of_another_shape(self, own_metrics, tmp_path):
        with pytest.raises(InputError, match=r"returned shape \(4, 2\) for 4 examples"):
            evaluate(np.abs, examples_of(tmp_path / "x", np.ones((5, 3)), np.ones(5)),
                     f"{own_metrics}:two_numbers")  # fmt: skip

    def test_batch_size_of_the_session_comes_first(self, tmp_path):
        session = NumPySession(np.abs, input_shape=(6, 3))
        accuracy.evaluate(
            session, examples_of(tmp_path, np.ones((10, 3)), np.zeros(10)),
            metrics={"out0": "top1"}, output_name="out0", batch_size=4, reference=None,
        )  # fmt: skip
        assert session.batch_sizes == [6, 6]

    def test_input_without_a_batch(self, tmp_path):
        examples = examples_of(tmp_path / "x", np.arange(5), np.arange(5) * 2.0)
        found, compared = (
            evaluate(function, examples, "mae", tmp_path / "reference", input_shape=())
            for function in (lambda x: x * 2, lambda x: x * 3)
        )
        np.testing.assert_array_equal(scores_of(found).scores, np.zeros(5))
        np.testing.assert_array_equal(scores_of(compared).scores, np.arange(5))
        assert compared.fidelity["out0"].max_abs_error == 4


class TestComparison:
    """With the outputs of the model as saved; see test_fidelity.py for the figures."""

    def test_decisions_that_differ_are_lost(self, tmp_path):
        x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
        shift = np.array([0.5, 0, 0], np.float32)
        baseline, candidate = evaluate_both(
            tmp_path, x, np.zeros(50), "top1", lambda x: x, lambda x: x + shift
        )
        expected = x.argmax(1) != (x + shift).argmax(1)
        assert 0 < expected.mean() < 1
        np.testing.assert_array_equal(candidate.lost["out0"], expected)
        assert candidate.fidelity["out0"].agreement == pytest.approx(1 - expected.mean())
        assert candidate.fidelity["out0"].max_abs_error == pytest.approx(0.5, rel=1e-5)
        assert baseline.lost == {}

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_of_small_floats(self, dtype, tmp_path):
        import ml_dtypes

        dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
        x = np.random.default_rng(0).normal(size=(20, 3)).astype(dtype).astype(np.float32)
        _, candidate = evaluate_both(
            tmp_path, x, np.arange(20) % 3, "top1",
            lambda x: x.astype(dtype), lambda x: (-x).astype(dtype),
        )  # fmt: skip
        np.testing.assert_array_equal(candidate.lost["out0"], x.argmax(1) != x.argmin(1))
        np.testing.assert_array_equal(scores_of(candidate).scores, x.argmin(1) == np.arange(20) % 3)
        assert candidate.fidelity["out0"].max_abs_error == pytest.approx(2 * np.abs(x).max())

    def test_all_outputs_are_compared_and_the_worst_counts(self, tmp_path):
        """Without labels and without a named output."""
        x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)

        def both(x, scale=1.0):
            return {"out0": x, "out1": (scale * x[:, 0]).astype(np.float32)}

        reference, candidate = evaluate_both(
            tmp_path, x, None, "agreement", both, lambda x: both(x, 1.5), num_outputs=2, output=None
        )
        assert candidate.lost.keys() == {"out0", "out1"}
        assert accuracy.most_lost(candidate) == "out1"
        expected = np.mean(np.abs(0.5 * x[:, 0])) / x[:, 0].std()
        drop = drop_of((reference, candidate))
        assert drop.estimate == pytest.approx(expected, rel=1e-4)
        assert accuracy.question(candidate) == (
            "the error as a share of the output's standard deviation in output 'out1'"
        )

    def test_output_without_a_batch_dimension(self, tmp_path):
        """Boxes of one image, as many as it has: each example is run and compared by itself."""
        x = np.random.default_rng(0).uniform(1, 9, size=(12, 3)).astype(np.float32)
        sessions = []

        def boxes(x, factor=1.0):
            sessions.append(len(x))
            return (factor * np.tile(x[:1], (int(x[0, 0]), 1))).astype(np.float32)

        _, candidate = evaluate_both(
            tmp_path, x, None, "agreement", boxes, lambda x: boxes(x, -1), output=None
        )
        assert sessions[1:] == [1] * 24 and sessions[0] == 4
        found = candidate.fidelity["out0"]
        assert (found.num_examples, found.num_other_shapes) == (12, 0)
        assert found.max_abs_error == pytest.approx(2 * x.max(), rel=1e-5)
        assert found.sqnr_db < 0

    def test_output_without_a_batch_dimension_of_a_fixed_batch(self, tmp_path):
        """It belongs to each example of the batch that it came with."""
        x = np.arange(24.0).reshape(8, 3)
        reference, candidate = evaluate_both(
            tmp_path, x, None, "agreement", lambda x: x.sum(0)[:2], lambda x: x.sum(0)[:2] + 1,
            output=None, input_shape=(4, 3),
        )  # fmt: skip
        assert drop_of((reference, candidate)).estimate > 0
        found = candidate.fidelity["out0"]
        assert (found.num_examples, found.max_abs_error) == (8, 1)

    def test_another_number_of_boxes(self, tmp_path):
        x = np.arange(1, 9)[:, None] * np.ones(3)
        _, candidate = evaluate_both(
            tmp_path, x, None, "agreement", lambda x: np.ones((int(x[0, 0]), 4)),
            lambda x: np.ones((int(x[0, 0]) + (x[0, 0] > 5), 4)), output=None,
        )  # fmt: skip
        found = candidate.fidelity["out0"]
        assert (found.num_examples, found.num_other_shapes) == (8, 3)
        np.testing.assert_array_equal(candidate.lost["out0"], [0, 0, 0, 0, 0, 1, 1, 1])

    def test_another_shape_is_counted(self, tmp_path):
        _, candidate = evaluate_both(
            tmp_path, np.ones((5, 3)), None, "agreement", lambda x: x, first_columns, output=None
        )
        found = candidate.fidelity["out0"]
        assert found.num_other_shapes == found.num_examples == 5
        assert found.shapes == "(2,) instead of (3,)"

    def test_only_what_was_kept_is_compared(self, tmp_path, monkeypatch):
        monkeypatch.setattr(accuracy, "REFERENCE_BYTES", 3 * 4 * 6)  # six examples
        baseline, candidate = evaluate_both(
            tmp_path, np.ones((10, 3)), np.zeros(10), "top1", lambda x: x, lambda x: x + 1
        )
        assert scores_of(baseline).num_examples == scores_of(candidate).num_examples == 10
        assert len(candidate.lost["out0"]) == 8  # whole batches
        assert candidate.fidelity["out0"].max_abs_error == 1


class TestAccuracyDrop:
    def test_top1_is_tango(self, tmp_path):
        generator = np.random.default_rng(0)
        x, labels = generator.normal(size=(80, 3)), generator.integers(3, size=80)
        both = evaluate_both(
            tmp_path, x, labels, "top1", lambda x: x, lambda x: x + np.array([0.4, 0, 0])
        )
        x = x.astype(np.float32)
        before = x.argmax(1) == labels
        after = (x + np.array([0.4, 0, 0])).argmax(1) == labels
        drop = drop_of(both)
        assert drop == statistics.paired_proportion_bound(before, after)
        assert drop.estimate == pytest.approx(before.mean() - after.mean())
        assert drop.low < drop.estimate < drop.high

    def test_nothing_lost_still_has_a_bound(self, tmp_path):
        both = evaluate_both(
            tmp_path, np.eye(3)[[0, 1, 2] * 20], [0, 1, 2] * 20, "top1", np.abs, np.abs
        )
        drop = drop_of(both)
        z_squared = statistics.NormalDist().inv_cdf(0.95) ** 2
        assert drop.estimate == 0
        assert drop.high == pytest.approx(z_squared / (60 + z_squared))

    def test_auc_is_delong(self, tmp_path):
        generator = np.random.default_rng(0)
        labels = np.arange(60) % 2
        x = (labels + generator.normal(size=60))[:, None].astype(np.float32)
        noise = generator.normal(size=(60, 1))
        noise_of = dict(zip(x[:, 0].tolist(), noise[:, 0], strict=True))

        def noisy(x):
            return np.array([[v + noise_of[v]] for v in x[:, 0].tolist()])

        both = evaluate_both(tmp_path, x, labels, "auc", lambda x: x, noisy, input_shape=(None, 1))
        drop = drop_of(both)
        assert drop == statistics.paired_auc_bound(labels, x[:, 0], (x + noise)[:, 0])
        assert drop.estimate == pytest.approx(scores_of(both[0]).value - scores_of(both[1]).value)
        assert drop.estimate > 0

    @pytest.mark.parametrize("labels", [[0, 0, 0, 1], [1, 1, 1, 0]])
    def test_auc_with_one_example_of_a_class_is_boundless(self, labels, tmp_path):
        x = [[0.0], [2.0], [3.0], [1.0]]
        both = evaluate_both(
            tmp_path, x, labels, "auc", lambda x: x, lambda x: -x, input_shape=(None, 1)
        )
        drop = drop_of(both)
        assert drop.estimate == pytest.approx(scores_of(both[0]).value - scores_of(both[1]).value)
        assert (drop.low, drop.high) == (-math.inf, math.inf)

    @pytest.mark.parametrize(("factor", "is_worse"), [(2.0, True), (0.5, False)])
    @pytest.mark.parametrize("metric", ["mse", "mae"])
    def test_of_errors_is_positive_where_they_grow(self, metric, factor, is_worse, tmp_path):
        x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
        both = evaluate_both(
            tmp_path, x, np.zeros((50, 3)), metric, lambda x: x, lambda x: x * factor
        )
        score = METRICS[metric].score
        grown = score(x * factor, np.zeros((50, 3))) - score(x, np.zeros((50, 3)))
        drop = drop_of(both)
        expected = statistics.paired_mean_bound(grown)
        assert (drop.estimate, drop.low, drop.high) == pytest.approx(
            (expected.estimate, expected.low, expected.high)
        )
        assert drop.low > 0 if is_worse else drop.high < 0

    def test_custom_errors_of_0_and_1_are_proportions(self, own_metrics, tmp_path):
        """A bootstrap of differences that are all 0 would claim to be certain."""
        x, labels = np.eye(3)[[0, 1, 2] * 20], np.array([0, 1, 2] * 20)
        both = evaluate_both(
            tmp_path, x, labels, f"{own_metrics}:is_wrong", np.abs, lambda x: x + (x[:, :1] == 1)
            * np.array([0, 5 * (x[0, 0] == 1), 0]),
        )  # fmt: skip
        before, after = (1 - scores_of(e).scores for e in both)
        assert before.mean() > after.mean()
        assert drop_of(both) == statistics.paired_proportion_bound(before, after)

    def test_custom_metric_of_the_set_is_a_bootstrap(self, own_metrics, tmp_path):
        generator = np.random.default_rng(0)
        x, labels = generator.normal(size=(40, 3)).astype(np.float32), generator.normal(size=40)
        both = evaluate_both(
            tmp_path, x, labels, f"{own_metrics}:share_above", lambda x: x, lambda x: x - 0.3
        )
        drop = drop_of(both)

        def lost(i):
            return np.mean(x[i, 0] > labels[i]) - np.mean(x[i, 0] - 0.3 > labels[i])

        drops = statistics.resample(lost, 40)
        expected = statistics.bootstrap_bound(lost(np.arange(40)), drops, 40)
        assert (drop.estimate, drop.low, drop.high) == pytest.approx(
            (expected.estimate, expected.low, expected.high)
        )
        assert drop.estimate > 0

    def test_custom_error_of_the_set_has_the_other_sign(self, own_metrics, tmp_path):
        x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
        both = evaluate_both(
            tmp_path, x, np.zeros(40), f"{own_metrics}:largest_error", lambda x: x,
            lambda x: x * 3,
        )  # fmt: skip
        drop = drop_of(both)
        assert drop.estimate == pytest.approx(2 * np.abs(x[:, 0]).max(), rel=1e-6)
        assert drop.low > 0

    def test_custom_metric_that_is_undefined_on_samples_is_boundless(self, own_metrics, tmp_path):
        """One positive of three examples is missing from a third of the samples."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            both = evaluate_both(
                tmp_path, np.eye(3), [0, 1, 0], f"{own_metrics}:of_positives_only", np.abs, np.abs
            )
        found = drop_of(both)
        assert (found.estimate, found.low, found.high) == (0, -math.inf, math.inf)

    def test_without_labels_decisions_are_proportions(self, tmp_path):
        x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)

        def softmax(x):
            return np.exp(x) / np.exp(x).sum(1, keepdims=True)

        both = evaluate_both(
            tmp_path, x, None, "agreement", softmax, lambda x: softmax(x + np.array([0.5, 0, 0]))
        )
        same = ~both[1].lost["out0"]
        assert 0 < same.mean() < 1
        drop = drop_of(both)
        assert drop == statistics.paired_proportion_bound(np.ones(50), same)
        assert drop.estimate == pytest.approx(1 - same.mean())

    def test_without_labels_shares_of_decisions_are_means(self, tmp_path):
        x = np.random.default_rng(0).integers(0, 3, size=(30, 12))
        both = evaluate_both(
            tmp_path, x, None, "agreement", lambda x: x.astype(int),
            lambda x: np.minimum(x, 1).astype(int), input_shape=(None, 12),
        )  # fmt: skip
        lost = (x == 2).mean(1)
        np.testing.assert_allclose(both[1].lost["out0"], lost)
        assert drop_of(both) == statistics.paired_mean_bound(lost)

    def test_without_labels_the_bound_follows_the_question(self, tmp_path):
        """Two variants, one with and one without any loss, are bounded in the same way."""
        x = np.random.default_rng(0).uniform(0.6, 1, size=(200, 12)).astype(np.float32)
        x *= np.random.default_rng(1).integers(0, 2, size=x.shape)

        def one_off(x):
            return np.where(x == x.max(), 0, x)

        highs = []
        for name, change in (("same", np.abs), ("off", one_off)):
            both = evaluate_both(
                tmp_path / name, x, None, "agreement", np.abs, change, input_shape=(None, 12)
            )
            assert both[1].lost["out0"].dtype == float
            highs.append(drop_of(both).high)
        assert highs[0] == 0 < highs[1]

    def test_without_labels_errors_are_shares_of_the_spread(self, tmp_path):
        x = np.random.default_rng(0).normal(size=(30, 1)).astype(np.float32)
        both = evaluate_both(
            tmp_path, x, None, "agreement", lambda x: x, lambda x: x * (1 + 0.1 * (x > 0)),
            input_shape=(None, 1),
        )  # fmt: skip
        drop = drop_of(both)
        assert drop.estimate == pytest.approx(np.mean(0.1 * np.maximum(x, 0)) / x.std(), rel=1e-5)

    @pytest.mark.parametrize(
        ("labels", "metric", "baseline", "candidate", "expected"),
        [
            ([0], "top1", lambda x: x, lambda x: x, 0),
            ([0], "top1", lambda x: x, lambda x: x[:, ::-1], 1),
            ([[1, 0, 0]], "mae", lambda x: x, lambda x: x + 2, 2),
            (None, "agreement", lambda x: x, lambda x: x, 0),
            (None, "agreement", lambda x: x.astype(int), lambda x: 1 - x.astype(int), 1),
            (None, "agreement", lambda x: x[:, :1], lambda x: 1.5 * x[:, :1], 0.5),
        ],
    )
    def test_one_example_proves_nothing(
        self, labels, metric, baseline, candidate, expected, tmp_path
    ):
        both = evaluate_both(tmp_path, [[1, 0, 0]], labels, metric, baseline, candidate)
        drop = drop_of(both)
        assert drop.estimate == expected
        assert (drop.low, drop.high) == (-math.inf, math.inf)


class TestAnswers:
    def test_are_right_or_wrong(self, tmp_path):
        x = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
        examples = examples_of(tmp_path, x, np.arange(30) % 3)
        found = scores.answers(scores_of(evaluate(lambda x: x, examples, "top1")))
        np.testing.assert_array_equal(found, x.argmax(1) == np.arange(30) % 3)
        assert found.dtype == bool

    def test_errors_have_none(self, tmp_path):
        examples = examples_of(tmp_path / "a", np.ones((5, 3)), np.ones((5, 3)))
        assert scores.answers(scores_of(evaluate(lambda x: x, examples, "mae"))) is None


class TestFile:
    @settings(deadline=None, max_examples=25)
    @given(
        st.sampled_from(["example", "ranking", "set"]),
        st.booleans(),
        hnp.arrays(np.float64, 5),
        hnp.arrays(np.float32, (5, 2)),
        st.floats(),
    )
    def test_round_trip(self, tmp_path_factory, level, is_higher, numbers, outputs, error):
        saved = accuracy.Evaluation(
            {"out:0": scores.Scores(
                "m", is_higher, level, numbers, 5, np.arange(5), outputs[:, 0], not is_higher,
                error, np.arange(3), np.arange(3) + 1,
            )},
            {"labels": numbers[::-1]},
            {"out:0": Fidelity("values", 5, 1, "(2,) instead of (3,)", max_abs_error=error)},
        )  # fmt: skip
        path = tmp_path_factory.mktemp("evaluation") / "new" / "one.npz"
        saved.save(path)
        opened = accuracy.Evaluation.open(path)
        np.testing.assert_array_equal(opened.lost["labels"], saved.lost["labels"])
        for nested in ("scores", "fidelity"):
            found, expected = getattr(opened, nested), getattr(saved, nested)
            assert found.keys() == expected.keys()
            for name in expected:
                np.testing.assert_equal(vars(found[name]), vars(expected[name]))

    def test_drops_of_saved_evaluations_are_the_same(self, own_metrics, tmp_path):
        x = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
        for metric in ("top1", f"{own_metrics}:share_above"):
            folder = tmp_path / metric.replace(":", "_")
            both = evaluate_both(folder, x, np.arange(30) % 3, metric, lambda x: x, lambda x: -x)
            for index, evaluation in enumerate(both):
                evaluation.save(folder / f"{index}.npz")
            opened = [accuracy.Evaluation.open(folder / f"{index}.npz") for index in (0, 1)]
            assert drop_of(opened) == drop_of(both)
            assert scores_of(opened[0]).value == scores_of(both[0]).value
