import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tfopt.errors import InputError
from tfopt.measure import metrics

finite = st.floats(-100, 100, width=32)


@st.composite
def scores_and_labels(draw):
    count, width = draw(st.integers(1, 12)), draw(st.integers(2, 8))
    # Few distinct scores, so that ties are common.
    elements = draw(st.sampled_from([finite, st.integers(-2, 2).map(float)]))
    outputs = draw(hnp.arrays(np.float32, (count, width), elements=elements))
    labels = draw(hnp.arrays(np.int64, count, elements=st.integers(0, width - 1)))
    return outputs, labels


def rank(scores, label):
    """How many classes come before the label: higher scores, and equal ones of a lower number."""
    return sum(
        score > scores[label] or (score == scores[label] and index < label)
        for index, score in enumerate(scores)
    )


class TestMetrics:
    @given(scores_and_labels(), st.sampled_from(["flat", "column", "one-hot", "float"]))
    def test_top_k_by_counting(self, given_values, form):
        outputs, labels = given_values
        ranks = [rank(row, label) for row, label in zip(outputs, labels, strict=True)]
        given_labels = {
            "flat": labels,
            "column": labels[:, None],
            "one-hot": np.eye(outputs.shape[1])[labels],
            "float": labels.astype(np.float32),
        }[form]
        np.testing.assert_array_equal(
            metrics.top1(outputs, given_labels), [float(r < 1) for r in ranks]
        )
        np.testing.assert_array_equal(
            metrics.top5(outputs, given_labels), [float(r < 5) for r in ranks]
        )

    def test_top1_is_argmax(self):
        outputs = np.random.default_rng(0).normal(size=(50, 7))
        labels = np.random.default_rng(1).integers(7, size=50)
        np.testing.assert_array_equal(metrics.top1(outputs, labels), outputs.argmax(1) == labels)

    @pytest.mark.parametrize("dtype", ["int8", "uint8", "bool", "float16", "int64"])
    def test_top1_of_quantized_scores(self, dtype):
        # -128 has no opposite in int8, and neither has any number in uint8.
        limits = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else None
        low, high = (limits.min, limits.max) if limits else (0, 1)
        outputs = np.array([[low, high, low], [high, low, low], [low, low, high]]).astype(dtype)
        np.testing.assert_array_equal(metrics.top1(outputs, np.array([1, 0, 2])), [1, 1, 1])
        np.testing.assert_array_equal(metrics.top1(outputs, np.array([0, 1, 1])), [0, 0, 0])

    @given(
        hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 4)), elements=finite),
        st.data(),
    )
    def test_errors_by_loops(self, outputs, data):
        labels = data.draw(hnp.arrays(np.float32, outputs.shape, elements=finite))
        differences = [
            [float(o) - float(y) for o, y in zip(row, row_labels, strict=True)]
            for row, row_labels in zip(outputs, labels, strict=True)
        ]
        np.testing.assert_allclose(
            metrics.mse(outputs, labels), [sum(d * d for d in r) / len(r) for r in differences]
        )
        np.testing.assert_allclose(
            metrics.mae(outputs, labels), [sum(map(abs, r)) / len(r) for r in differences]
        )

    def test_errors_of_integers_do_not_wrap(self):
        outputs, labels = np.array([[0], [255]], np.uint8), np.array([255, 0], np.uint8)
        np.testing.assert_array_equal(metrics.mae(outputs, labels), [255, 255])
        np.testing.assert_array_equal(metrics.mse(outputs, labels), [255**2, 255**2])

    @pytest.mark.parametrize("as_logits", [False, True])
    def test_auc_scores_rank_like_the_probability_of_class_1(self, as_logits):
        logits = np.random.default_rng(0).normal(size=(30, 2))
        probability = np.exp(logits[:, 1]) / np.exp(logits).sum(1)
        outputs = logits if as_logits else np.stack([1 - probability, probability], 1)
        scores = metrics.auc(outputs, np.zeros(30))
        np.testing.assert_array_equal(np.argsort(scores), np.argsort(probability))

    def test_auc_scores_of_one_output(self):
        np.testing.assert_array_equal(
            metrics.auc(np.array([[0.5], [2.0]]), np.zeros(2)), [0.5, 2.0]
        )
        np.testing.assert_array_equal(metrics.auc(np.array([0.5, 2.0]), np.zeros(2)), [0.5, 2.0])

    def test_refuse_what_does_not_fit(self):
        with pytest.raises(InputError, match=r"top1 needs one score a class.*\(3, 1\)"):
            metrics.top1(np.zeros((3, 1)), np.zeros(3))
        with pytest.raises(InputError, match=r"top5 needs one score a class.*\(2, 4, 3\)"):
            metrics.top5(np.zeros((2, 4, 3)), np.zeros(2))
        with pytest.raises(InputError, match=r"one label an example.*shape \(6,\) for 3"):
            metrics.top1(np.zeros((3, 4)), np.zeros((3, 2)))
        with pytest.raises(InputError, match=r"Labels of shape \(3,\) cannot be compared"):
            metrics.mse(np.zeros((3, 4)), np.zeros(3))


class TestChooseMetric:
    @pytest.mark.parametrize(
        ("shape", "labels", "expected"),
        [
            ((None, 10), None, "agreement"),
            ((None, 10), np.array([0, 9, 3]), "top1"),
            ((None, 10), np.array([[0], [9]]), "top1"),
            ((None, 10), np.array([0.0, 9.0]), "top1"),
            ((None, 2), np.array([True, False]), "top1"),
            ((None, 3), np.eye(3), "top1"),
            ((None, 3), np.eye(3)[[0, 0, 2]].astype(bool), "top1"),
            ((None, None), np.array([1, 2]), "top1"),
            ((None, 3), np.full((2, 3), 0.5), "mse"),
            ((None, 3), np.ones((2, 3)), "mse"),
            ((None, 3), np.array([0.5, 1.5]), "mse"),
            ((None, 8, 3), np.zeros((2, 8, 3)) + 0.5, "mse"),
            ((None, 1), np.array([0, 1, 1]), "auc"),
            ((None, 1), np.array([[0.0], [1.0]]), "auc"),
            ((None,), np.array([True, False]), "auc"),
            (None, np.array([0, 1]), "auc"),
            ((None, 1), np.array([0, 2]), "mse"),
            ((None, 1), np.array([0.25, 1.0]), "mse"),
        ],
    )
    def test_table(self, shape, labels, expected):
        assert metrics.choose_metric(shape, labels) == expected

    @pytest.mark.parametrize("labels", [np.array(["a", "b"]), np.array([b"a", b"b"], object)])
    @pytest.mark.parametrize("shape", [(None, 3), (None, 1)])
    def test_text_cannot_be_compared(self, shape, labels):
        with pytest.raises(InputError, match=r"labels are text.*--metric"):
            metrics.choose_metric(shape, labels)


class TestFindMetric:
    def test_by_name(self):
        for name, found in metrics.METRICS.items():
            assert metrics.find_metric(name) is found
            assert found.name == name
        assert {"top1", "top5", "mse", "mae", "auc"} <= set(metrics.METRICS)
        assert not metrics.find_metric("mse").higher_is_better

    def test_unknown_lists_the_names(self):
        with pytest.raises(InputError) as caught:
            metrics.find_metric("top2")
        assert "'top2'" in str(caught.value)
        assert "package.module:function" in str(caught.value)
        for name in metrics.METRICS:
            assert name in str(caught.value)

    @pytest.mark.parametrize("name", ["no_such_module:f", "json:no_such_function"])
    def test_no_function(self, name):
        with pytest.raises(InputError, match=rf"--metric={name} cannot be found \(.*no_such"):
            metrics.find_metric(name)
