import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import f1_score
from sklearn.metrics.pairwise import cosine_distances

from tfopt.measure.outputs import Detections, Kind, Output, find_detections, infer, infer_kind, lost

RNG = np.random.default_rng(0)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


NORMAL = RNG.normal(size=(60, 12))
ONE_OF_12 = np.eye(12)[RNG.integers(0, 12, 60)]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (softmax(NORMAL), Kind.CLASS_SCORES),
        (softmax(NORMAL).astype(np.float16), Kind.CLASS_SCORES),
        (np.log(softmax(NORMAL)), Kind.CLASS_SCORES),
        (softmax(RNG.normal(size=(5, 8, 8, 3))), Kind.CLASS_SCORES),
        (9 * ONE_OF_12 + NORMAL, Kind.CLASS_SCORES),  # logits of a trained classifier
        (sigmoid(8 * NORMAL), Kind.PROBABILITIES),
        (sigmoid(8 * NORMAL[:, :1]), Kind.PROBABILITIES),
        (sigmoid(8 * NORMAL[:, 0]), Kind.PROBABILITIES),
        (RNG.uniform(size=(9, 16, 16, 3)), Kind.VALUES),  # an image
        (0.1 * NORMAL, Kind.VALUES),
        (np.sort(RNG.uniform(0, 90, (60, 3)), 1), Kind.VALUES),  # quantiles
        (np.sort(RNG.uniform(-9, 90, (60, 15)), 1), Kind.VALUES),  # the last is always highest
        (NORMAL[:, :1], Kind.VALUES),
        (NORMAL[:, 0], Kind.VALUES),
        (RNG.normal(size=(60, 64)), Kind.EMBEDDING),
        (np.maximum(RNG.normal(size=(60, 64)), 0), Kind.EMBEDDING),
        (NORMAL / np.linalg.norm(NORMAL, axis=1, keepdims=True), Kind.EMBEDDING),
        (RNG.integers(0, 9, (60,)), Kind.NUMBERS),
        (NORMAL > 0, Kind.NUMBERS),
        (np.array([b"a", b"b"], object), Kind.TEXT),
        (np.full((60, 12), np.nan), Kind.VALUES),
        (np.zeros((0, 4)), Kind.VALUES),
    ],
)  # fmt: skip
def test_kinds(values, kind):
    assert infer_kind(values) is kind


class TestLost:
    def test_class_scores(self):
        other = NORMAL[:, ::-1]
        expected = NORMAL.argmax(1) != other.argmax(1)
        np.testing.assert_array_equal(lost(infer("o", softmax(NORMAL)), other, NORMAL), expected)

    def test_probabilities_are_f1_of_what_is_present(self):
        reference, value = (sigmoid(RNG.normal(-1, 3, (40, 9))) for _ in range(2))
        expected = [
            1 - f1_score(theirs > 0.5, ours > 0.5, zero_division=1)
            for ours, theirs in zip(value, reference, strict=True)
        ]
        found = lost(Output("o", Kind.PROBABILITIES), value, reference)
        np.testing.assert_allclose(found, expected)
        # All zeros miss everything that is there.
        assert lost(Output("o", Kind.PROBABILITIES), 0 * reference, reference).mean() > 0.9

    def test_embeddings_are_cosine_distances(self):
        value, reference = RNG.normal(size=(2, 7, 20))
        expected = np.diag(cosine_distances(value, reference))
        np.testing.assert_allclose(lost(Output("o", Kind.EMBEDDING), value, reference), expected)
        zeros = np.zeros((7, 20))
        assert lost(Output("o", Kind.EMBEDDING), zeros, reference).tolist() == [1] * 7
        assert lost(Output("o", Kind.EMBEDDING), zeros, zeros).tolist() == [0] * 7

    def test_values_are_shares_of_each_channels_spread(self):
        reference = RNG.normal(size=(500, 3)) * [1, 100, 0.01]
        output = infer("o", reference)
        np.testing.assert_allclose(output.spread, reference.std(0))
        error = np.array([0, 0, 0.005])
        found = lost(output, reference + error, reference)
        np.testing.assert_allclose(found, 0.005 / reference[:, 2].std() / np.sqrt(3))

    def test_a_channel_that_does_not_vary(self):
        reference = np.stack([np.full(50, 7.0), RNG.normal(size=50)], 1)
        found = lost(infer("o", reference), reference * [1.1, 1], reference)
        np.testing.assert_allclose(found, 0.1 / np.sqrt(2))

    @settings(deadline=None, max_examples=50)
    @given(
        hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=4, max_side=5),
                   elements=st.floats(-1e6, 1e6, width=32)),
    )  # fmt: skip
    def test_nothing_is_lost_by_the_model_itself(self, values):
        output = infer("o", values)
        found = lost(output, values, values)
        assert found.shape == (len(values),)
        np.testing.assert_array_equal(found, 0)


class TestDetections:
    BOXES = np.array([[0, 0, 2, 2], [5, 5, 9, 9], [0, 0, 0, 0]], np.float32)
    SCORES = np.array([0.9, 0.8, 0.0], np.float32)

    def outputs(self, **changes):
        found = {"boxes": self.BOXES, "classes": np.array([1.0, 2, 0]), "scores": self.SCORES}
        return {**found, **changes}

    def test_are_found_by_their_shapes_and_values(self):
        examples = {name: [value] * 3 for name, value in self.outputs().items()}
        examples["num"] = [np.array(2)] * 3
        assert find_detections(examples) == Detections("boxes", "scores", "classes")
        del examples["classes"]
        assert find_detections(examples) == Detections("boxes", "scores", None)
        examples["boxes"] = [value[:, ::-1] for value in examples["boxes"]]  # no corners
        assert find_detections(examples) is None
        assert find_detections({"o": [np.ones((3, 4), np.float32)]}) is None

    def test_numbers_of_boxes_that_differ_from_image_to_image(self):
        counts = [3, 1, 2]
        examples = {
            name: [value[:count] for count in counts] for name, value in self.outputs().items()
        }
        assert find_detections(examples) == Detections("boxes", "scores", "classes")

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({}, 0),
            ({"boxes": BOXES[[1, 0, 2]], "classes": np.array([2.0, 1, 0])}, 0),  # another order
            ({"boxes": BOXES * 10}, 1),
            ({"classes": np.array([2.0, 2, 0])}, 0.5),
            ({"scores": SCORES * [1, 0, 0]}, 1 - 2 / 3),
            ({"scores": SCORES * 0}, 1),
            ({"boxes": BOXES + np.float32(0.5)}, 0.5),  # overlaps 0.39 and 0.62
        ],
    )
    def test_lost(self, changes, expected):
        detections = Detections("boxes", "scores", "classes")
        found = detections.match(self.outputs(**changes), self.outputs()).lost
        assert found == pytest.approx(expected)

    def test_no_boxes_at_all(self):
        empty = {"boxes": np.zeros((0, 4)), "scores": np.zeros(0), "classes": np.zeros(0)}
        detections = Detections("boxes", "scores", "classes")
        assert detections.match(empty, empty).lost == 0
        assert detections.match(empty, self.outputs()).lost == 1


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(Kind), st.lists(st.floats(0, 1e9), min_size=1, max_size=4), st.booleans())
def test_json_round_trip(kind, spread, is_whole):
    output = Output("o", kind, tuple(spread), -1, is_whole)
    assert Output.from_json(output.to_json()) == output
