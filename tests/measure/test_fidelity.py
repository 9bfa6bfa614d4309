import json
import math

import numpy as np
import pytest

from tfopt.examples import Examples, ExampleWriter
from tfopt.measure import comparing
from tfopt.measure.comparing import DETECTIONS, Comparer, Reference, Sample
from tfopt.measure.outputs import Kind

RNG = np.random.default_rng(0)


def compare(folder, reference, candidate, batch_size=7, whole=(), class_scores=()):
    """Writes outputs of the model as saved, and compares others with them, batch by batch."""
    sample = Sample()
    count = len(next(iter(reference.values())))
    with ExampleWriter(folder) as writer:
        for start in range(0, count, batch_size):
            batch = {name: value[start : start + batch_size] for name, value in reference.items()}
            writer.append(batch)
            sample.add(batch)
    sample.save(folder, set(whole), class_scores)
    comparer = Comparer(Reference.open(folder))
    for start in range(0, count, batch_size):
        comparer.add({k: v[start : start + batch_size] for k, v in candidate.items()})
    return comparer


def one(folder, reference, candidate, **options):
    return compare(folder, {"o": reference}, {"o": candidate}, **options).fidelity()["o"]


def decibels(reference, candidate):
    """By the definition, over all examples at once."""
    signal = np.square(reference - reference.mean(0)).sum()
    return 10 * np.log10(signal / np.square(reference - candidate).sum())


@pytest.mark.parametrize("shape", [(50,), (50, 1), (50, 4), (50, 6, 5), (50, 3, 4, 2)])
@pytest.mark.parametrize("offset", [0, 1000])
def test_signal_to_noise_by_the_definition(shape, offset, tmp_path):
    reference = (offset + RNG.normal(size=shape)).astype(np.float32)
    candidate = reference + RNG.normal(size=shape).astype(np.float32) / 10
    found = one(tmp_path, reference, candidate)
    wide = reference.astype(np.float64), candidate.astype(np.float64)
    difference = np.abs(wide[0] - wide[1])
    assert found.sqnr_db == pytest.approx(decibels(*wide), abs=1e-6)
    expected = 10 * np.log10(np.square(wide[0]).sum() / np.square(difference).sum())
    assert found.relative_db == pytest.approx(expected)
    assert found.max_abs_error == pytest.approx(difference.max())
    assert found.mean_abs_error == pytest.approx(difference.mean())
    noise = np.square(difference).reshape(50, -1).sum(1)
    trimmed = decibels(*wide) + 10 * np.log10(noise.sum() / np.sort(noise)[:-1].sum())
    assert found.trimmed_sqnr_db == pytest.approx(trimmed)
    assert (found.num_examples, found.num_other_shapes, found.dtypes) == (50, 0, "")


def test_the_same_to_the_last_bit(tmp_path):
    values = RNG.normal(size=(20, 5)).astype(np.float32)
    found = one(tmp_path, values, values.copy())
    assert found.sqnr_db == found.relative_db == found.channel_db == math.inf
    assert found.max_abs_error == 0 and not found.is_constant


def test_more_bits_are_more_decibels(tmp_path):
    x = RNG.uniform(-1, 1, (4000, 1)).astype(np.float32)
    steps = [2.0 ** (1 - bits) for bits in (4, 8)]
    found = [
        one(tmp_path / str(step), x, np.round(x / step).astype(np.float32) * step).sqnr_db
        for step in steps
    ]
    # Uniform values: the ratio is that of variances, 6.02 dB a bit.
    assert found == pytest.approx([6.02 * 4, 6.02 * 8], abs=0.3)


def test_a_constant_answer_has_no_signal(tmp_path):
    """However near it is on average: the position of a box varies little beside its place."""
    reference = 100 * np.arange(8)[None] + RNG.normal(size=(40, 8))
    found = one(tmp_path, reference, np.broadcast_to(reference.mean(0), reference.shape))
    assert found.is_constant and found.sqnr_db == pytest.approx(0, abs=1e-9)
    assert found.relative_db > 50


def test_an_output_that_does_not_vary_is_all_signal(tmp_path):
    anchors = np.broadcast_to(RNG.normal(size=(9, 4)), (30, 9, 4)).copy()
    found = one(tmp_path, anchors, anchors + 1e-3)
    expected = 10 * np.log10(np.square(anchors).sum() / anchors.size / 1e-6)
    assert found.sqnr_db == pytest.approx(expected)
    assert not found.is_constant


def test_shapes_that_differ_from_example_to_example(tmp_path):
    """Centred by one mean, since no entry has a place of its own."""
    reference = [RNG.normal(3, 1, (count, 4)) for count in (2, 5, 1, 3)]
    folder = tmp_path / "ragged"
    sample = Sample()
    with ExampleWriter(folder) as writer:
        for row in reference:
            writer.append({"o": row[None]})
            sample.add({"o": row[None]})
    sample.save(folder, {"o"})
    comparer = Comparer(Reference.open(folder))
    for row in reference:
        comparer.add({"o": row[None] + 0.1})
    flat = np.concatenate([row.ravel() for row in reference])
    expected = 10 * np.log10(np.square(flat - flat.mean()).sum() / (0.01 * flat.size))
    assert comparer.fidelity()["o"].sqnr_db == pytest.approx(expected)


def test_worst_channel(tmp_path):
    reference = RNG.normal(size=(80, 6)) * [1, 1, 1, 0.01, 1, 1]
    candidate = reference + RNG.normal(size=reference.shape) / 1000
    candidate[:, 3] = 0
    found = one(tmp_path, reference, candidate)
    assert found.channel == 3
    expected = decibels(reference[:, 3], np.zeros(80))
    assert found.channel_db == pytest.approx(expected)
    assert found.sqnr_db > 40


def test_channels_of_a_detector_come_second(tmp_path):
    reference = RNG.normal(size=(6, 5, 600)) * np.array([300, 300, 300, 300, 0.1])[:, None]
    candidate = reference.copy()
    candidate[:, 4] = 0
    found = one(tmp_path, reference, candidate)
    assert found.channel == 4 and found.channel_db == pytest.approx(0, abs=0.1)
    assert found.sqnr_db > 60


def test_entries_of_an_embedding_that_hardly_vary_do_not_count(tmp_path):
    scale = np.ones(64)
    scale[:8] = 0.01
    reference = RNG.normal(size=(100, 64)) * scale
    found = one(tmp_path, reference, reference + RNG.normal(size=(100, 64)) * 0.05)
    assert found.channel >= 8 and found.channel_db == pytest.approx(26, abs=3)


def test_probabilities_below_what_int8_can_show_do_not_count(tmp_path):
    scores = np.zeros((200, 5))
    scores[np.arange(200), RNG.integers(0, 4, 200)] = 1
    scores[:, 4] = RNG.uniform(0, 0.004, 200)
    scores[:, 0] += 1 - scores.sum(1)
    scores = np.clip(scores, 0, 1)
    found = one(tmp_path, scores, np.round(scores * 256) / 256, class_scores=["o"])
    assert found.channel != 4 and found.channel_db > 30


def test_numbers_that_are_not_found_again(tmp_path):
    reference = (RNG.uniform(size=4000) < 0.01).astype(np.int64)
    found = one(tmp_path, reference, np.zeros(4000, np.int64), batch_size=512)
    assert found.kind == Kind.NUMBERS
    assert found.differing == reference.mean()
    assert (found.lost_number, found.found_again) == (1, 0)
    assert found.agreement == pytest.approx(1 - reference.mean())


def test_text(tmp_path):
    words = np.array([b"a", b"b", b"c", b"d"], object)
    found = one(tmp_path, words, np.array([b"a", b"b", b"c", b"x"], object))
    assert (found.kind, found.differing, found.agreement) == (Kind.TEXT, 0.25, 0.75)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_examples_are_counted(value, tmp_path):
    reference = RNG.normal(size=(10, 3))
    candidate = reference.copy()
    candidate[[2, 7], 1] = value
    found = one(tmp_path, reference, candidate)
    assert found.num_not_finite == 2
    assert found.max_abs_error == 0


def test_not_finite_where_the_reference_is_not_either(tmp_path):
    reference = np.array([[np.nan, 1], [-np.inf, 2], [np.inf, 4]])
    found = one(tmp_path, reference, reference + 0.5)
    assert (found.num_not_finite, found.max_abs_error) == (0, 0.5)


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        (np.ones((6, 2), np.float32), ""),
        (np.ones((6, 2), np.float16), ""),
        (np.ones((6, 2), np.int64), "int64 instead of float32"),
        (np.full((6, 2), b"1", object), "object instead of float32"),
    ],
)
def test_dtypes(candidate, expected, tmp_path):
    assert one(tmp_path, np.ones((6, 2), np.float32), candidate).dtypes == expected


def test_missing_output(tmp_path):
    reference = {"a": np.ones((6, 2)), "b": np.ones((6, 2))}
    comparer = compare(tmp_path, reference, {"a": np.ones((6, 2))})
    assert comparer.fidelity()["b"].num_other_shapes == 6
    assert comparer.fidelity()["b"].shapes == "missing"
    np.testing.assert_array_equal(comparer.lost["b"], 1)


def test_outputs_of_a_detector_are_compared_together(tmp_path):
    corners = RNG.uniform(0, 10, (12, 3, 2))
    reference = {
        "boxes": np.concatenate([corners, corners + 5], -1).astype(np.float32),
        "scores": np.sort(RNG.uniform(0.2, 1, (12, 3)).astype(np.float32))[:, ::-1],
        "classes": np.tile(np.arange(3, dtype=np.float32), (12, 1)),
        "count": np.full(12, 3, np.int32),
    }
    # One image has its boxes in another order, as after scores that were all but equal.
    other = {name: value.copy() for name, value in reference.items()}
    for name in ("boxes", "scores", "classes"):
        other[name][4] = other[name][4, ::-1]
    comparer = compare(tmp_path, reference, other)
    found = comparer.fidelity()
    assert found[DETECTIONS].agreement == 1
    assert found["boxes"].is_detected and found["boxes"].sqnr_db == math.inf
    assert not found["count"].is_detected
    json.dumps(comparer.detected)


def test_only_the_first_examples_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "SAMPLE_EXAMPLES", 3)
    sample = Sample()
    sample.add({"o": np.array([[0.9, 0.1]] * 3 + [[5.0, 5.0]])})
    with ExampleWriter(tmp_path) as writer:
        writer.append({"o": np.ones((4, 2))})
    sample.save(tmp_path, set())
    assert Reference.open(tmp_path).outputs["o"].kind is Kind.CLASS_SCORES
    assert len(Examples(tmp_path)) == 4
