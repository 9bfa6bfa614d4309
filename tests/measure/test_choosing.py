"""Labels and outputs of models as people have them, and the metric that belongs to them."""

import numpy as np
import pytest

from tfopt.errors import InputError
from tfopt.measure import choosing, scores
from tfopt.measure.choosing import scored_outputs
from tfopt.measure.metric_names import find_metric
from tfopt.measure.outputs import infer_kind

COUNT = 200


def generator():
    return np.random.default_rng(0)


def softmax(values):
    found = np.exp(values - values.max(-1, keepdims=True))
    return (found / found.sum(-1, keepdims=True)).astype(np.float32)


def sigmoid(values):
    return (1 / (1 + np.exp(-values))).astype(np.float32)


def logits_of(labels, num_classes, scale=4.0):
    """What a trained classifier returns: mostly right, never certain."""
    labels = np.where((labels < 0) | (labels >= num_classes), 0, labels).astype(int)
    noise = generator().normal(size=(*labels.shape, num_classes))
    return (scale * np.eye(num_classes)[labels] + noise).astype(np.float32)


def chosen(outputs, labels, batch_size=64):
    outputs, labels = np.asarray(outputs), np.asarray(labels)
    batches = [labels[i : i + batch_size] for i in range(0, len(labels), batch_size)]
    summary = choosing.summarize(batches)
    return choosing.choose_metric(outputs, infer_kind(outputs), summary)


def value(outputs, labels):
    """The metric that is chosen, computed."""
    metric = find_metric(chosen(outputs, labels))
    collector = scores.Collector(metric, "out")
    for start in range(0, len(labels), 64):
        collector.add({"out": outputs[start : start + 64]}, labels[start : start + 64])
    return collector.finish()


CLASSES = generator().integers(4, size=COUNT)
BINARY = generator().integers(2, size=COUNT)


class TestClasses:
    @pytest.mark.parametrize(
        "activation", [softmax, sigmoid, lambda x: x], ids=["softmax", "sigmoid", "logits"]
    )
    @pytest.mark.parametrize(
        "labels",
        [CLASSES, CLASSES[:, None], CLASSES.astype(np.float32), CLASSES.astype(np.uint8),
         np.eye(4)[CLASSES], np.eye(4)[CLASSES].astype(bool), 0.9 * np.eye(4)[CLASSES] + 0.025],
        ids=["flat", "column", "float", "uint8", "one-hot", "bool", "smoothed"],
    )  # fmt: skip
    def test_forms(self, activation, labels):
        outputs = activation(logits_of(CLASSES, 4))
        is_smoothed = not np.isin(labels, range(4)).all()
        if is_smoothed and activation is sigmoid:
            return  # four numbers that add up to 1 could be shares
        assert chosen(outputs, labels) == "top1"
        expected = np.mean(outputs.argmax(1) == CLASSES)
        assert value(outputs, labels).value == pytest.approx(expected) and expected > 0.9

    def test_examples_without_a_label_are_left_out(self):
        labels = np.where(np.arange(COUNT) % 5, CLASSES, -1)
        outputs = logits_of(CLASSES, 4)
        assert value(outputs, labels).num_examples == COUNT * 4 // 5

    def test_numbers_of_the_model_itself(self):
        """A model that ends in argmax."""
        assert (
            value(CLASSES.astype(np.int32), np.where(np.arange(COUNT) % 4, CLASSES, 9)).value
            == 0.75
        )

    def test_class_numbers_from_1(self):
        with pytest.raises(InputError, match=r"of 200 labels lie outside 0 to 3.*from 1 to 4"):
            chosen(softmax(logits_of(CLASSES, 4)), CLASSES + 1)


class TestTwoClasses:
    @pytest.mark.parametrize("activation", [sigmoid, lambda x: x], ids=["probability", "logit"])
    @pytest.mark.parametrize("shape", [(COUNT,), (COUNT, 1)])
    @pytest.mark.parametrize(
        "labels",
        [BINARY, BINARY[:, None], BINARY.astype(bool), BINARY.astype(np.float32), 2 * BINARY - 1,
         np.eye(2, dtype=int)[BINARY]],
        ids=["flat", "column", "bool", "float", "-1 and 1", "one-hot"],
    )  # fmt: skip
    def test_one_score(self, labels, shape, activation):
        outputs = activation(3 * BINARY + generator().normal(size=COUNT) - 1.5).reshape(shape)
        assert chosen(outputs, labels) == "auc"
        flat = outputs.ravel()
        pairs = flat[BINARY == 1][:, None] > flat[BINARY == 0]
        assert value(outputs, labels).value == pytest.approx(pairs.mean(), abs=1e-3)

    def test_labels_1_and_2(self):
        outputs = sigmoid(6 * BINARY + generator().normal(size=COUNT) - 3)
        assert chosen(outputs, BINARY + 1) == "auc"
        assert value(outputs, BINARY + 1).value > 0.99

    @pytest.mark.parametrize("labels", [BINARY, BINARY.astype(bool), np.eye(2)[BINARY]])
    def test_two_scores(self, labels):
        assert chosen(softmax(logits_of(BINARY, 2)), labels) == "top1"

    def test_0_8_percent_of_positives(self):
        """The first 64 labels are all 0: none of them shows that there are two classes."""
        labels = (np.arange(1000) % 125 == 124).astype(int)
        outputs = sigmoid(8 * labels + generator().normal(size=1000) - 4)
        assert not labels[:64].any() and chosen(outputs[:, None], labels) == "auc"
        found = value(softmax(logits_of(labels, 2, 3.0)), labels)
        assert scores.recall(found).keys() == {0, 1} and found.occurring.tolist() == [992, 8]


class TestNumbers:
    def test_whole_targets_of_one_number(self):
        ages = generator().integers(18, 90, size=COUNT)
        assert chosen(ages[:, None] + generator().normal(size=(COUNT, 1)), ages) == "mse"

    def test_ordinal_grades_of_one_number(self):
        grades = generator().integers(5, size=COUNT)
        assert chosen((grades + 0.3)[:, None].astype(np.float32), grades) == "mse"

    def test_counts_of_which_the_first_are_0_and_1(self):
        counts = np.sort(generator().poisson(2.0, size=600))
        assert set(counts[:64]) <= {0, 1}
        assert chosen(counts[:, None] * 0.9 + 0.1, counts) == "mse"

    @pytest.mark.parametrize("labels", ["ages", "children", "grams"])
    def test_quantiles_are_no_class_scores(self, labels):
        labels = {
            "ages": generator().integers(18, 90, size=COUNT),
            "children": generator().integers(3, size=COUNT),  # within the three columns
            "grams": generator().normal(size=COUNT),
        }[labels]
        spread = np.abs(generator().normal(size=(COUNT, 3))).cumsum(1)
        outputs = labels[:, None] + spread - spread[:, 1:2]
        with pytest.raises(InputError, match=r"`metric=pinball\(quantiles="):
            chosen(outputs, labels)

    def test_cumulative_probabilities_of_grades(self):
        grades = generator().integers(3, size=COUNT)  # 3 of the 4 grades occur
        outputs = sigmoid(
            4.0 * (grades[:, None] - np.arange(3)) - 2 + generator().normal(size=(COUNT, 1))
        )
        with pytest.raises(InputError, match="in order of size"):
            chosen(outputs, grades)

    def test_logits_of_a_class_that_nearly_always_wins_stay_classes(self):
        labels = (np.arange(COUNT) % 50 == 1).astype(int)
        outputs = np.array([5.0, 1.0, -3.0]) + 0.1 * generator().normal(size=(COUNT, 3))
        assert chosen(outputs, labels) == "top1"

    @pytest.mark.parametrize("activation", [np.tanh, lambda x: 3 * x], ids=["tanh", "linear"])
    def test_moods_of_minus_one_zero_and_one(self, activation):
        """-1 is a value here; as a missing label it would leave two classes and an AUC."""
        moods = generator().integers(-1, 2, size=COUNT)
        outputs = activation(moods + 0.3 * generator().normal(size=COUNT))[:, None]
        with pytest.raises(InputError, match=r"labels are -1, 0 and 1.*`metric=mse` for values"):
            chosen(outputs, moods)

    def test_embeddings_are_no_class_scores(self):
        vectors = generator().normal(size=(COUNT, 32))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        with pytest.raises(InputError, match="a vector of length 1, as embeddings are"):
            chosen(vectors, generator().integers(20, size=COUNT))

    def test_several_numbers(self):
        outputs = generator().normal(size=(COUNT, 4))
        assert chosen(outputs, outputs.round()) == "mse"
        assert chosen(outputs.reshape(COUNT, 2, 2), outputs.reshape(COUNT, 2, 2) + 1) == "mse"

    def test_brightness(self):
        images = generator().uniform(0.3, 0.7, size=(COUNT, 4, 4, 1)).astype(np.float32)
        assert chosen(images, images + 0.01) == "mse"


class TestTags:
    LABELS = (generator().normal(size=(COUNT, 5)) > 0.5).astype(int)

    @pytest.mark.parametrize(
        ("activation", "threshold"), [(sigmoid, 0.5), (lambda x: x, 0)], ids=["sigmoid", "logits"]
    )
    @pytest.mark.parametrize("dtype", [int, bool, np.float32])
    def test_several_tags(self, activation, threshold, dtype):
        from sklearn.metrics import f1_score

        outputs = activation(4 * self.LABELS - 2 + generator().normal(size=self.LABELS.shape))
        labels = self.LABELS.astype(dtype)
        assert chosen(outputs, labels) == f"macro_f1(threshold={threshold})"
        expected = f1_score(self.LABELS, outputs > threshold, average="macro")
        assert value(outputs, labels).value == pytest.approx(expected)

    def test_the_first_hold_one_tag_each(self):
        order = np.argsort(np.abs(self.LABELS.sum(1) - 1), kind="stable")
        labels = self.LABELS[order]
        assert (labels[:64].sum(1) == 1).all()
        outputs = sigmoid(4 * labels - 2 + generator().normal(size=labels.shape))
        assert chosen(outputs, labels) == "macro_f1(threshold=0.5)"

    @pytest.mark.parametrize("activation", [sigmoid, lambda x: x], ids=["sigmoid", "logits"])
    def test_no_tag_at_all(self, activation):
        """F1 is 0 for every model then, also for one that finds all tags everywhere."""
        outputs = activation(generator().normal(size=(COUNT, 6)) - 2)
        labels = np.zeros((COUNT, 6), int)
        expected = (outputs <= (0.5 if activation is sigmoid else 0)).mean()
        assert value(outputs, labels).value == pytest.approx(expected)
        assert value(outputs + 9, labels).value == 0

    def test_1000_rare_tags(self):
        labels = np.zeros((COUNT, 1000), np.uint8)
        labels[np.arange(COUNT), generator().integers(1000, size=COUNT)] = 1
        labels[np.arange(COUNT), generator().integers(1000, size=COUNT)] = 1
        zeros, right = (
            value(np.zeros(labels.shape, np.float32), labels),
            value(labels * 0.9, labels),
        )
        assert (zeros.value, right.value) == (0, 1)


class TestPositions:
    MASKS = generator().integers(3, size=(40, 6, 7))

    @pytest.mark.parametrize("form", ["flat", "channel", "one-hot"])
    def test_masks(self, form):
        labels = {
            "flat": self.MASKS, "channel": self.MASKS[..., None], "one-hot": np.eye(3)[self.MASKS]
        }[form]  # fmt: skip
        assert chosen(softmax(logits_of(self.MASKS, 3)), labels) == "mean_iou"

    def test_pixels_to_ignore(self):
        labels = np.where(generator().uniform(size=self.MASKS.shape) < 0.1, 255, self.MASKS)
        outputs = softmax(logits_of(self.MASKS, 3, 20.0))
        assert chosen(outputs, labels.astype(np.uint8)) == "mean_iou(ignore=255)"
        assert value(outputs, labels.astype(np.uint8)).value == 1

    @pytest.mark.parametrize("activation", [sigmoid, lambda x: x], ids=["sigmoid", "logits"])
    @pytest.mark.parametrize("has_channel", [True, False])
    def test_two_classes_with_pixels_to_ignore(self, activation, has_channel):
        masks = self.MASKS % 2
        outputs = activation(8.0 * masks - 4 + generator().uniform(size=masks.shape))
        threshold = 0.5 if activation is sigmoid else 0
        if has_channel:
            outputs = outputs[..., None]
        assert chosen(outputs, masks) == f"mean_iou(threshold={threshold})"
        labels = np.where(generator().uniform(size=masks.shape) < 0.1, 255, masks)
        assert chosen(outputs, labels) == f"mean_iou(ignore=255,threshold={threshold})"
        assert value(outputs, labels).value == 1

    def test_masks_of_0_and_255(self):
        masks = self.MASKS % 2
        for outputs in (sigmoid(8.0 * masks - 4)[..., None], softmax(logits_of(masks, 2))):
            with pytest.raises(InputError, match="divide the labels by 255"):
                chosen(outputs, masks * 255)

    def test_class_numbers_of_the_model_itself_with_pixels_to_ignore(self):
        labels = np.where(generator().uniform(size=self.MASKS.shape) < 0.2, 255, self.MASKS)
        for num_classes, of in ((3, labels), (2, np.where(labels == 2, 1, labels))):
            outputs = np.minimum(self.MASKS, num_classes - 1).astype(np.int32)
            assert chosen(outputs, of) == f"mean_iou(ignore=255,num_classes={num_classes})"
            assert value(outputs, of).value == 1

    @pytest.mark.parametrize("padding", [-1, -100])
    def test_tokens_with_padding(self, padding):
        labels = generator().integers(5, size=(COUNT, 9))
        is_padding = np.arange(9) >= generator().integers(3, 9, size=(COUNT, 1))
        outputs = logits_of(labels, 5)
        padded = np.where(is_padding, padding, labels)
        assert chosen(outputs, padded) == "position_accuracy"
        expected = (outputs.argmax(-1) == labels)[~is_padding].mean()
        assert value(outputs, padded).value == pytest.approx(expected)

    def test_tokens_one_hot(self):
        labels = generator().integers(5, size=(COUNT, 9))
        assert chosen(softmax(logits_of(labels, 5)), np.eye(5)[labels]) == "position_accuracy"


class TestRefused:
    @pytest.mark.parametrize("labels", [np.array(["a", "b"] * 9), np.array([b"a"] * 18, object)])
    def test_text(self, labels):
        with pytest.raises(InputError, match=r"labels are text.*`metric"):
            chosen(np.zeros((18, 3)), labels)

    def test_other_shapes(self):
        with pytest.raises(InputError, match=r"have shape \(7,\) and the outputs \(3,\)"):
            chosen(generator().normal(size=(20, 3)), np.zeros((20, 7)))

    def test_no_label_at_all(self):
        with pytest.raises(InputError, match="All labels are missing"):
            chosen(logits_of(CLASSES, 4), np.full(COUNT, -1))


class TestScoredOutputs:
    BOTH = ("boxes", "classes")

    @pytest.mark.parametrize(
        ("metric", "output_name", "labelled", "expected"),
        [
            (None, None, None, {}),
            (None, None, BOTH, {"boxes": None, "classes": None}),
            (None, None, ("classes",), {"classes": None}),
            (None, "boxes", BOTH, {"boxes": None}),
            (None, "boxes", (), {"boxes": None}),
            ("mae", None, BOTH, {"boxes": "mae", "classes": "mae"}),
            ("mae", "boxes", (), {"boxes": "mae"}),
            ("boxes=mae,classes=top1", None, BOTH, {"boxes": "mae", "classes": "top1"}),
            ("boxes=mae", None, BOTH, {"boxes": "mae"}),
            ("boxes=mae,classes=top1", "classes", BOTH, {"classes": "top1"}),
            ("classes=top1", None, (), {"classes": "top1"}),
            ("m:f", None, BOTH, {"*": "m:f"}),
            ("m:f", "boxes", (), {"boxes": "m:f"}),
        ],
    )
    def test_table(self, metric, output_name, labelled, expected):
        assert scored_outputs(metric, output_name, self.BOTH, labelled) == expected

    @pytest.mark.parametrize(
        ("metric", "output_name", "labelled", "message"),
        [
            ("top1", None, None, "'top1' needs labels and the data has none"),
            (None, None, (), "name the one that the labels belong to with `output_name`"),
            (None, "other", BOTH, "No output 'other'; the model's outputs are: boxes, classes"),
            ("other=mae", None, BOTH, "`metric` names the output 'other'"),
            ("boxes=mae", None, ("classes",), "no labels of output 'boxes'"),
            (None, "boxes", ("classes",), "no labels of output 'boxes'"),
        ],
    )
    def test_refusals(self, metric, output_name, labelled, message):
        with pytest.raises(InputError, match=message):
            scored_outputs(metric, output_name, self.BOTH, labelled)
