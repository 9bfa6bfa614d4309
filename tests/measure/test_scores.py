"""A metric of one output: gathered, compared, scaled, and classes that hardly count."""

import dataclasses

import numpy as np
import pytest

from tests.measure.test_accuracy import NumPySession
from tfopt.errors import ConversionError, InputError
from tfopt.examples import Examples, ExampleWriter, label_column
from tfopt.measure import accuracy, scores, statistics
from tfopt.measure.metric_names import find_metric, name_of
from tfopt.measure.metrics import Metric
from tfopt.measure.scores import Collector


def collect(metric, outputs, labels, batch_size=16, **options):
    found = metric if isinstance(metric, Metric) else find_metric(metric)
    collector = Collector(found, "o", **options)
    for start in range(0, len(outputs), batch_size):
        stop = start + batch_size
        collector.add({"o": outputs[start:stop]}, labels[start:stop])
    return collector.finish()


class TestByName:
    def setup_method(self):
        generator = np.random.default_rng(0)
        self.labels = generator.integers(3, size=90)
        logits = 2 * np.eye(3)[self.labels] + generator.normal(size=(90, 3))
        self.outputs = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)

    @pytest.mark.parametrize("batch_size", [7, 90])
    def test_scikit_learn(self, batch_size):
        from sklearn import metrics

        predicted = self.outputs.argmax(1)
        one_hot = np.eye(3)[self.labels]
        for name, expected in {
            "sklearn:f1_score(average=macro)": metrics.f1_score(
                self.labels, predicted, average="macro"
            ),
            "sklearn:cohen_kappa_score": metrics.cohen_kappa_score(self.labels, predicted),
            "sklearn:log_loss": metrics.log_loss(self.labels, self.outputs),
            "sklearn:roc_auc_score(multi_class=ovr)": metrics.roc_auc_score(
                self.labels, self.outputs, multi_class="ovr"
            ),
        }.items():
            found = collect(name, self.outputs, self.labels, batch_size)
            assert found.value == pytest.approx(expected), name
            assert found.higher_is_better == ("loss" not in name)
        found = collect("sklearn:f1_score(average=macro)", self.outputs, one_hot)
        assert found.value == pytest.approx(
            metrics.f1_score(self.labels, predicted, average="macro")
        )

    def test_keras(self):
        import keras

        accuracy_of = keras.metrics.SparseCategoricalAccuracy()
        found = collect(name_of(accuracy_of), self.outputs, self.labels)
        assert found.value == pytest.approx(np.mean(self.outputs.argmax(1) == self.labels))
        loss = collect("keras:SparseCategoricalCrossentropy", self.outputs, self.labels)
        expected = -np.log(self.outputs[np.arange(90), self.labels]).mean()
        assert loss.value == pytest.approx(expected, rel=1e-5) and not loss.higher_is_better
        theirs = keras.metrics.MeanIoU(num_classes=3, sparse_y_pred=False)
        theirs.update_state(self.labels, self.outputs)
        found = collect(name_of(theirs), self.outputs, self.labels)
        assert found.value == pytest.approx(float(theirs.result()), rel=1e-5)

    def test_what_does_not_fit_is_one_sentence(self):
        with pytest.raises(InputError, match=r"sklearn:f1_score fails .* average.*or another"):
            collect("sklearn:f1_score", self.outputs, self.labels)
        with pytest.raises(InputError, match=r"confusion_matrix|Unknown metric"):
            collect("sklearn:confusion_matrix", self.outputs, self.labels)

    @pytest.mark.parametrize("error", [AttributeError("no x"), KeyError("x"), ZeroDivisionError()])
    def test_functions_that_raise(self, error):
        def broken(outputs, labels):
            raise error

        with pytest.raises(InputError, match=rf"fails on outputs of shape.*{type(error).__name__}"):
            collect(Metric("m:broken", broken, level="custom"), self.outputs, self.labels)


class TestScale:
    """A budget of 0.01 means the same whatever unit the targets have."""

    @pytest.mark.parametrize("unit", [1e-4, 1.0, 1e4])
    @pytest.mark.parametrize("metric", ["mse", "mae", "sklearn:mean_squared_error"])
    def test_of_the_mean_label(self, metric, unit):
        generator = np.random.default_rng(0)
        labels = unit * generator.normal(3, 2, size=(60, 1))
        outputs = labels + unit * 0.1 * generator.normal(size=(60, 1))
        found = collect(metric, outputs, labels, mean_label=labels.mean(0))
        spread = labels - labels.mean()
        expected = np.abs(spread).mean() if metric == "mae" else np.square(spread).mean()
        assert found.has_scale and found.unit == pytest.approx(expected)

    def test_zeros_on_small_targets_lose_a_lot(self):
        """Absolutely the loss is 1e-4, far below 0.01."""
        labels = 0.01 * np.random.default_rng(0).normal(size=(100, 1)).astype(np.float32)
        before = collect("mse", labels * 1.01, labels, mean_label=labels.mean(0))
        after = collect("mse", labels * 0, labels)
        assert before.value - after.value > -2e-4
        both = (accuracy.Evaluation({"o": found}) for found in (before, after))
        (drop,) = accuracy.accuracy_drops(*both)
        assert drop.shares.estimate == pytest.approx(1, abs=0.05) and drop.is_error

    def test_of_scores_is_1(self):
        assert collect("top1", np.eye(3), np.arange(3)).unit == 1.0

    def test_own_shares_of_wrong_answers_have_none(self):
        def wrong(outputs, labels):
            return outputs.argmax(1) != labels

        own = Metric("m:wrong", wrong, False, "custom", is_unbounded=True)
        outputs = np.eye(3)[[0, 1, 2, 0]]
        assert not collect(own, outputs, np.array([0, 1, 2, 2])).has_scale


class TestNotFinite:
    @pytest.mark.parametrize(
        ("is_reference", "kind"), [(True, InputError), (False, ConversionError)]
    )
    def test_is_named(self, is_reference, kind):
        outputs = np.array([[1.0], [np.nan], [2.0]])
        with pytest.raises(kind, match="mse is not a finite number on 1 of 3 examples"):
            collect("mse", outputs, np.ones((3, 1)), is_reference=is_reference)


class TestSums:
    def test_drop_is_a_paired_bootstrap_over_examples(self):
        generator = np.random.default_rng(0)
        labels = generator.integers(2, size=(40, 5, 5))
        both = []
        for noise in (0.3, 0.5):
            outputs = labels + noise * generator.normal(size=labels.shape)
            both.append(collect("mean_iou(threshold=0.5)", outputs, labels))
        found = scores.drop(*both)
        metric = find_metric("mean_iou(threshold=0.5)")

        def lost(indices):
            values = [metric.value(part.scores[indices].sum(0)) for part in both]
            return float(values[0] - values[1])

        drops = statistics.resample(lost, 40, scores.NUM_RESAMPLES)
        expected = statistics.bootstrap_bound(lost(np.arange(40)), drops, 40)
        assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(expected))
        assert found.low > 0


class TestRareClasses:
    LABELS = (np.arange(1000) % 125 == 124).astype(int)

    def scored(self, num_missed):
        outputs = np.eye(2)[self.LABELS]
        outputs[np.flatnonzero(self.LABELS)[:num_missed]] = [1, 0]
        return collect("top1", outputs, self.LABELS)

    def test_recall_stands_beside_top1(self):
        before, after = self.scored(2), self.scored(8)
        assert before.value - after.value == pytest.approx(0.006)  # inside a budget of a point
        assert scores.recall_note(before, after) == (
            "The recall of class 1 is 0.00 against 0.75 (8 of 1000 labels)."
        )
        assert scores.recall_note(before, before) == (
            "The recall of class 1 is 0.75 against 0.75 (8 of 1000 labels)."
        )

    def test_equal_classes_need_no_note(self):
        labels = np.arange(300) % 3
        found = collect("top1", np.eye(3)[labels], labels)
        assert scores.recall_note(found, found) is None


class TestSeveralOutputs:
    """A metric for each output, with labels by name."""

    def test_the_worst_comes_first(self, tmp_path):
        generator = np.random.default_rng(0)
        x = generator.normal(size=(50, 3)).astype(np.float32)
        classes = x.argmax(1)
        with ExampleWriter(tmp_path / "examples") as writer:
            writer.append(
                {"x": x, label_column("out0"): classes, label_column("out1"): 2 * x[:, :1]}
            )
        examples = Examples(tmp_path / "examples")
        assert examples.label_names == ("out0", "out1")

        def model(x, error=0.0):
            return {"out0": x, "out1": 2 * x[:, :1] + error, "out2": x}

        found = accuracy.choose_metrics(
            NumPySession(model, num_outputs=3), examples, examples.label_names
        )
        assert found == {"out0": "top1", "out1": "mse"}
        before, after = (
            accuracy.evaluate(
                NumPySession(lambda x, e=error: model(x, e), num_outputs=3), examples,
                metrics=found, batch_size=8, reference=None,
            )
            for error in (0.1, 1.0)
        )  # fmt: skip
        assert before.values == pytest.approx({"out0": 1.0, "out1": 0.01}, rel=1e-4)
        drops = accuracy.accuracy_drops(before, after)
        assert [drop.output for drop in drops] == ["out1", "out0"]
        assert drops[0].interval.estimate == pytest.approx(0.99, rel=1e-4)
        assert drops[0].unit == pytest.approx(np.square(2 * x[:, 0]).mean(), rel=0.2)
