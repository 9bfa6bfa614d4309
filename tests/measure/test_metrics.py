import numpy as np
import pytest
from hypothesis import given, settings
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


def loops(predicted, truth, num_classes):
    """Right, wrong and missed positions of each class, position by position."""
    counts = {c: [0, 0, 0] for c in range(num_classes)}
    for p, t in zip(predicted.ravel().tolist(), truth.ravel().tolist(), strict=True):
        if t in (-1, -100, 255):
            continue
        counts[t][0 if p == t else 2] += 1
        if p != t:
            counts[p][1] += 1
    return counts


@st.composite
def maps(draw):
    """Scores of classes at positions, and labels of which some are missing."""
    shape = draw(st.sampled_from([(3, 5), (2, 3, 4), (4, 1)]))
    width = draw(st.integers(2, 4))
    scores = draw(hnp.arrays(np.float32, (*shape, width), elements=finite, unique=True))
    labels = draw(
        hnp.arrays(np.int64, shape, elements=st.sampled_from([-100, -1, 255, *range(width)]))
    )
    return scores, labels


class TestPositions:
    @settings(deadline=None, max_examples=50)
    @given(maps())
    def test_by_loops(self, both):
        scores, labels = both
        width = scores.shape[-1]
        counts = loops(scores.argmax(-1), labels, width)
        right, wrong, missed = np.array(list(counts.values())).T
        total = right.sum() + missed.sum()

        def value(name, **options):
            found = metrics.METRICS[name]
            return float(found.value(found.score(scores, labels, **options).sum(0)))

        if not total:
            assert np.isnan(value("position_accuracy", ignore=255))
            return
        occurs = right + wrong + missed > 0
        iou = (right / np.maximum(right + wrong + missed, 1))[occurs].mean()
        f1 = (2 * right / np.maximum(2 * right + wrong + missed, 1))[occurs].mean()
        assert value("position_accuracy", ignore=255) == pytest.approx(right.sum() / total)
        assert value("mean_iou", ignore=255) == pytest.approx(iou)
        labels[labels == 255] = -1
        assert value("macro_f1") == pytest.approx(f1)

    def test_forms_of_labels_give_the_same(self):
        generator = np.random.default_rng(0)
        scores, labels = generator.normal(size=(5, 4, 6, 3)), generator.integers(3, size=(5, 4, 6))
        expected = metrics.mean_iou(scores, labels)
        forms = [labels[..., None], labels.astype(np.float32), np.eye(3)[labels]]
        for form in forms:
            np.testing.assert_array_equal(metrics.mean_iou(scores, form), expected)
        predicted = scores.argmax(-1)
        np.testing.assert_array_equal(metrics.mean_iou(predicted, labels, num_classes=3), expected)

    def test_iou_is_that_of_keras(self):
        import keras

        generator = np.random.default_rng(1)
        scores, labels = generator.normal(size=(6, 8, 8, 4)), generator.integers(3, size=(6, 8, 8))
        theirs = keras.metrics.MeanIoU(num_classes=4, sparse_y_pred=False)
        theirs.update_state(labels, scores)
        found = metrics.METRICS["mean_iou"]
        ours = found.value(found.score(scores, labels).sum(0))
        assert float(ours) == pytest.approx(float(theirs.result()), rel=1e-5)

    def test_one_score_a_pixel_by_threshold(self):
        masks = np.array([[[1, 0], [1, 1]]])
        logits = np.array([[[0.2, -3], [-1, 4]]])[..., None]
        assert metrics.position_accuracy(logits, masks, threshold=0).tolist() == [[3, 4]]
        assert metrics.position_accuracy(logits, masks, threshold=0.5).tolist() == [[2, 4]]

    def test_labels_that_are_no_class(self):
        with pytest.raises(InputError, match="from 0 to 2; 2 of 4 labels are others, such as 3"):
            metrics.mean_iou(np.zeros((1, 4, 3)), np.array([[0, 3, 1, 7]]))


class TestTags:
    def test_f1_is_that_of_scikit_learn(self):
        from sklearn.metrics import f1_score

        generator = np.random.default_rng(0)
        labels, scores = generator.integers(2, size=(60, 5)), generator.uniform(size=(60, 5))
        for name in ("macro", "micro"):
            found = metrics.METRICS[f"{name}_f1"]
            ours = found.value(found.score(scores, labels).sum(0))
            expected = f1_score(labels, scores > 0.5, average=name)
            assert float(ours) == pytest.approx(expected)

    def test_recall_of_tags(self):
        labels = np.array([[1, 0], [1, 0], [1, 1]])
        found, occurring = metrics.METRICS["macro_f1"].recall(
            np.array([[1, 1], [0, 0], [1, 0]]) * 0.9, labels
        )
        assert found.tolist() == [2, 0] and occurring.tolist() == [3, 1]


class TestPinball:
    def test_by_its_definition(self):
        outputs, labels = np.array([[1.0, 2.0, 3.0]]), np.array([2.5])
        expected = (0.1 * 1.5 + 0.5 * 0.5 + 0.1 * 0.5) / 3
        found = metrics.pinball(outputs, labels, quantiles=[0.1, 0.5, 0.9])
        np.testing.assert_allclose(found, [expected])

    def test_needs_one_number_for_each_quantile(self):
        with pytest.raises(InputError, match="2 quantiles, outputs of shape"):
            metrics.pinball(np.zeros((4, 3)), np.zeros(4), quantiles=[0.1, 0.9])
