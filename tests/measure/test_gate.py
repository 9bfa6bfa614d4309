"""Faults that metrics miss, and roundings that are none, at every precision's limit."""

import dataclasses
import math

import numpy as np
import pytest

from tests.measure.test_fidelity import compare
from tfopt.measure import gate
from tfopt.measure.comparing import DETECTIONS
from tfopt.measure.fidelity import Fidelity
from tfopt.measure.outputs import Kind

RNG = np.random.default_rng(1)
COUNT = 200


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).astype(np.float32)


def sigmoid(x):
    return (1 / (1 + np.exp(-x))).astype(np.float32)


def normal(*shape):
    return RNG.normal(size=(COUNT, *shape)).astype(np.float32)


def rounded(value, bits):
    """Uniform quantization over the range of a tensor, as int8 has it."""
    low, high = min(value.min(), 0), max(value.max(), 0)
    step = (high - low) / (2**bits - 1)
    return (np.round(value / step) * step).astype(value.dtype)


def noisy(value, share):
    """Noise in proportion to the spread of an output."""
    noise = RNG.normal(size=value.shape) * share * np.sqrt(value.var(0).mean())
    return (value + noise).astype(value.dtype)


SMALL_TARGETS = normal(1) * 0.05
MULTI_HOT = sigmoid(np.where(RNG.uniform(size=(COUNT, 1000)) < 0.003, 5, -8))
MASK = sigmoid(np.where(RNG.uniform(size=(COUNT, 16, 16, 1)) < 0.01, 5, -7))
PIXELS = softmax(np.stack([6 + 0 * MASK[..., 0], 12 * MASK[..., 0]], -1))
RARE = softmax(np.stack([np.full(COUNT, 3.0), np.where(np.arange(COUNT) % 125 == 0, 9, -3)], 1))
LOGITS = (9 * np.eye(10)[RNG.integers(0, 10, COUNT)] + normal(10)).astype(np.float32)
EMBEDDING = normal(128)
HEADS = normal(12)


def ruined(value, index, db):
    """One column replaced by noise at a signal to noise ratio."""
    found = value.copy()
    column = value[:, index]
    found[:, index] += RNG.normal(size=len(value)) * column.std() * 10 ** (-db / 20)
    return found


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [
        (SMALL_TARGETS, 0 * SMALL_TARGETS),
        (SMALL_TARGETS, -SMALL_TARGETS),
        (SMALL_TARGETS, SMALL_TARGETS.mean() + 0 * SMALL_TARGETS),
        (1000 + SMALL_TARGETS, 1000 + 0 * SMALL_TARGETS),
        (MULTI_HOT, 0 * MULTI_HOT),
        (MULTI_HOT, np.broadcast_to(MULTI_HOT.mean(0), MULTI_HOT.shape)),
        (MASK, 0 * MASK),
        (PIXELS, np.broadcast_to(np.array([1, 0], np.float32), PIXELS.shape)),
        (PIXELS.argmax(-1), 0 * PIXELS.argmax(-1)),
        (RARE, np.broadcast_to(np.array([1, 0], np.float32), RARE.shape)),
        (LOGITS, LOGITS[:, ::-1]),
        (LOGITS, -7 * LOGITS),
        (LOGITS, LOGITS[RNG.permutation(COUNT)]),
        (LOGITS, LOGITS * 3),
        (EMBEDDING, normal(128)),
        (EMBEDDING, EMBEDDING[:, RNG.permutation(128)]),
        (HEADS, ruined(HEADS, 7, 0.9)),
        (HEADS, ruined(HEADS, 7, -math.inf)),
        (normal(6, 4) + np.arange(6)[:, None] * 100, np.arange(6)[:, None] * 100.0 + normal(6, 4)),
        (LOGITS.argmax(1), (LOGITS.argmax(1) + 1) % 10),
        (LOGITS.argmax(1), np.where(LOGITS.argmax(1) == 3, 4, LOGITS.argmax(1))),
        (LOGITS, LOGITS.astype(np.int32)),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:invalid value")
def test_another_model_is_wrong_in_every_precision(reference, candidate, tmp_path):
    found = compare(tmp_path, {"o": reference}, {"o": np.nan_to_num(candidate)}).fidelity()
    for precision, limit in gate.LIMITS_DB.items():
        reason = gate.what_is_wrong(found, limit)
        assert reason and "'o' is not the model's: " in reason and reason.endswith("."), precision


@pytest.mark.parametrize(
    "reference",
    [SMALL_TARGETS, 1000 + SMALL_TARGETS * 1000, MASK, PIXELS, RARE, LOGITS, softmax(LOGITS),
     EMBEDDING, np.maximum(EMBEDDING, 0), HEADS, normal(6, 4), normal()],
)  # fmt: skip
@pytest.mark.parametrize(
    ("precision", "change"),
    [
        ("float32", lambda x: (x * (1 + 1e-6 * RNG.normal(size=x.shape))).astype(x.dtype)),
        ("float32", lambda x: x.astype(np.float32)),
        ("float16", lambda x: noisy(x, 0.01).astype(np.float16)),
        ("bfloat16", lambda x: noisy(x, 0.03)),
        ("int16x8", lambda x: noisy(x, 0.03)),
        ("int8", lambda x: rounded(x, 8)),
        ("int8", lambda x: noisy(x, 0.2)),
        ("dynamic_range", lambda x: noisy(x, 0.2)),
    ],
)
def test_rounding_is_not_wrong(reference, precision, change, tmp_path):
    found = compare(tmp_path, {"o": reference}, {"o": change(reference)}).fidelity()
    assert gate.what_is_wrong(found, gate.LIMITS_DB[precision]) is None, found


def test_a_decision_that_falls_the_other_way_is_no_fault(tmp_path):
    """One of 200 images gets its neighbour's answer, as after scores that were all but equal."""
    other = HEADS.copy()
    other[17] = HEADS[18]
    found = compare(tmp_path / "1", {"o": HEADS}, {"o": other}).fidelity()
    assert gate.what_is_wrong(found, gate.LIMITS_DB["float32"]) is None
    other[50:60] = HEADS[60:70]
    found = compare(tmp_path / "10", {"o": HEADS}, {"o": other}).fidelity()
    assert gate.what_is_wrong(found, gate.LIMITS_DB["float32"])


def test_probabilities_that_hardly_vary_are_rounded_to_steps(tmp_path):
    """As those of an untrained classifier: int8 has steps of 1/256."""
    scores = softmax(0.01 * LOGITS)
    found = compare(tmp_path, {"o": scores}, {"o": np.round(scores * 256) / 256}).fidelity()
    assert found["o"].sqnr_db < 20
    assert gate.what_is_wrong(found, gate.LIMITS_DB["int8"]) is None
    assert gate.what_is_wrong(found, gate.LIMITS_DB["float32"])


def test_a_second_output_counts_whatever_its_name(tmp_path):
    reference = {"a": HEADS, "z": LOGITS}
    found = compare(tmp_path, reference, {"a": HEADS, "z": -7 * LOGITS}).fidelity()
    reason = gate.what_is_wrong(found, gate.LIMITS_DB["int8"])
    assert reason.startswith("Output 'z' is not the model's: its signal is -18.")


def test_boxes_times_ten(tmp_path):
    corners = RNG.uniform(0, 10, (COUNT, 5, 2))
    reference = {
        "boxes": np.concatenate([corners, corners + 5], -1).astype(np.float32),
        "scores": RNG.uniform(0.2, 1, (COUNT, 5)).astype(np.float32),
    }
    wrong = {**reference, "boxes": reference["boxes"] * 10}
    found = compare(tmp_path / "wrong", reference, wrong).fidelity()
    reason = gate.what_is_wrong(found, gate.LIMITS_DB["int8"])
    assert reason.startswith("The detections are not the model's: 0.0% of its boxes")
    order = RNG.permuted(np.tile(np.arange(5), (COUNT, 1)), axis=1)
    same = {
        "boxes": np.take_along_axis(reference["boxes"], order[..., None], 1),
        "scores": np.take_along_axis(reference["scores"], order, 1),
    }
    found = compare(tmp_path / "same", reference, same).fidelity()
    assert gate.what_is_wrong(found, gate.LIMITS_DB["float32"]) is None


@pytest.mark.parametrize(
    "candidate",
    [lambda x: -x, lambda x: 0 * x, lambda x: x + 2 * normal(*x.shape[1:])],
    ids=["negated", "zeros", "noise"],
)
@pytest.mark.parametrize("shape", [(1,), (7,), (9, 40)])
def test_an_outlier_hides_nothing(candidate, shape, tmp_path):
    reference = normal(*shape)
    other = candidate(reference)
    reference[137] = other[137] = 1e4
    found = compare(tmp_path, {"o": reference}, {"o": other}).fidelity()
    assert found["o"].sqnr_db > 40
    for limit in gate.LIMITS_DB.values():
        assert "'o' is not the model's" in gate.what_is_wrong(found, limit)


def test_signal_without_outliers_by_the_definition(tmp_path):
    reference, noise = normal(7), normal(7) * 0.1
    reference[137] = 1e4
    found = compare(tmp_path, {"o": reference}, {"o": reference + noise}).fidelity()["o"]
    distances = np.square(reference - np.median(reference, 0)).sum(1)
    usual = np.argsort(distances)[: COUNT - 2]
    expected = distances[usual].sum() / np.square(noise)[usual].sum()
    assert found.usual_sqnr_db == pytest.approx(10 * np.log10(expected), abs=0.01)


@pytest.mark.parametrize(
    "reference",
    [
        np.sort(normal(1), 0),  # examples in order of time
        np.cumsum(normal(30, 2), 0),
        np.repeat(normal(4)[::50], 50, 0),
        np.exp(2 * normal(1)),
        np.where(np.arange(COUNT) % 70 == 9, 20, 0)[:, None] + 1e-6 * normal(1),  # seldom rains
    ],
)
def test_int8_of_values_in_order_or_with_long_tails_is_right(reference, tmp_path):
    found = compare(tmp_path, {"o": reference}, {"o": rounded(reference, 8)}).fidelity()
    assert gate.what_is_wrong(found, gate.LIMITS_DB["int8"]) is None


def test_exact_precisions_have_few_close_calls(tmp_path):
    """Three of 200 examples are cut off at a cap: no rounding of float32 does that."""
    values = np.exp(1.2 * normal(1))
    capped = np.minimum(values, np.sort(values, 0)[-4])
    found = compare(tmp_path, {"o": values}, {"o": capped}).fidelity()
    assert found["o"].sqnr_db > 10
    assert gate.what_is_wrong(found, gate.LIMITS_DB["float32"])


@pytest.mark.parametrize("precision", gate.LIMITS_DB)
def test_rounding_beside_zeros_and_constants_is_none(precision, tmp_path):
    zeros, constant = np.zeros((COUNT, 3), np.float32), np.full((COUNT, 3), 0.3, np.float32)
    reference = {"o": HEADS, "zeros": zeros, "constant": constant + 3e-8 * normal(3)}
    other = {"o": HEADS, "zeros": 1e-9 * normal(3), "constant": constant}
    comparer = compare(tmp_path / "right", reference, other)
    assert gate.what_is_wrong(comparer.fidelity(), gate.LIMITS_DB[precision]) is None
    assert max(lost.max() for lost in comparer.lost.values()) < 1e-6
    found = compare(tmp_path / "wrong", reference, other | {"zeros": 0.1 * normal(3)}).fidelity()
    assert "Output 'zeros'" in gate.what_is_wrong(found, gate.LIMITS_DB[precision])


def test_colours_are_no_class_numbers(tmp_path):
    images = RNG.integers(1, 255, (COUNT, 6, 6, 3)).astype(np.uint8)
    near = (images + RNG.integers(-1, 2, images.shape)).astype(np.uint8)
    found = compare(tmp_path / "near", {"o": images}, {"o": near}).fidelity()
    assert gate.what_is_wrong(found, gate.LIMITS_DB["int8"]) is None
    found = compare(tmp_path / "bgr", {"o": images}, {"o": images[..., ::-1]}).fidelity()
    assert gate.what_is_wrong(found, gate.LIMITS_DB["int8"])


def detections():
    corners = RNG.uniform(0, 80, (COUNT, 5, 2))
    return {
        "boxes": np.concatenate([corners, corners + RNG.uniform(10, 30, (COUNT, 5, 2))], -1),
        "scores": np.sort(RNG.uniform(0.1, 1, (COUNT, 5)))[:, ::-1],
        "classes": RNG.integers(4, size=(COUNT, 5)).astype(np.float64),
    }


@pytest.mark.parametrize(
    ("change", "precisions"),
    [
        (lambda o: {"scores": o["scores"] / 2}, gate.LIMITS_DB),
        (lambda o: {"scores": o["scores"][:, ::-1]}, gate.LIMITS_DB),
        (lambda o: {"scores": 1 + 0 * o["scores"]}, gate.LIMITS_DB),
        (lambda o: {"scores": np.where(o["classes"] == 3, 0, o["scores"])}, gate.LIMITS_DB),
        (lambda o: {"scores": o["scores"] * 0.95}, ("float32", "float16")),
        (lambda o: {"boxes": o["boxes"] + 1.5}, ("float32", "float16")),
        (lambda o: {"boxes": o["boxes"] * 1.01}, ("float32",)),
    ],
)
def test_scores_and_places_of_boxes_that_are_found_again(change, precisions, tmp_path):
    reference = detections()
    found = compare(tmp_path, reference, reference | change(reference)).fidelity()
    for precision in precisions:
        assert gate.what_is_wrong(found, gate.LIMITS_DB[precision]), precision


def test_signal_to_noise_of_boxes_by_the_definition(tmp_path):
    reference = detections()
    size = reference["boxes"][..., 2:] - reference["boxes"][..., :2]
    moved = reference["boxes"] + 0.02 * np.tile(size, 2)
    found = compare(
        tmp_path, reference, {**reference, "boxes": moved, "scores": 0.9 * reference["scores"]}
    ).fidelity()
    assert found["boxes"].sqnr_db == pytest.approx(-20 * np.log10(0.02))
    assert found["scores"].sqnr_db == pytest.approx(20)
    assert gate.what_is_wrong(found, gate.LIMITS_DB["int8"]) is None
    assert "Output 'scores' is not the model's: in boxes that are found again it is 20.0 dB" in (
        gate.what_is_wrong(found, gate.LIMITS_DB["float32"])
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_not_finite": 3}, "3 of 50 examples hold NaN or infinity where the model has"),
        ({"is_constant": True}, "it is the same for all 50 examples and the model's varies"),
        ({"num_other_shapes": 50, "shapes": "(2,) instead of (3,)"}, "its shape is (2,) instead"),
        ({"num_other_shapes": 50, "shapes": "missing"}, "it is missing"),
        ({"dtypes": "int64 instead of float32"}, "its dtype is int64 instead of float32"),
    ],
)
def test_faults_of_any_model(changes, expected):
    """Also of a student, which is another model by intention."""
    good = Fidelity(Kind.VALUES, 50, sqnr_db=-5.0)
    assert gate.what_is_wrong({"o": good}, None) is None
    reason = gate.what_is_wrong({"o": dataclasses.replace(good, **changes)}, None)
    assert reason.startswith(f"Output 'o' is not the model's: {expected}")


def test_the_worst_output_is_named():
    found = {name: Fidelity(Kind.VALUES, 50, sqnr_db=db, trimmed_sqnr_db=db, relative_db=db)
             for name, db in (("a", 9.0), ("b", -3.0), ("c", 60.0))}  # fmt: skip
    assert "Output 'b'" in gate.what_is_wrong(found, 10.0)


def test_an_explicit_limit_loosens_all_of_it(tmp_path):
    other = np.where(LOGITS.argmax(1) == 3, 4, LOGITS.argmax(1))
    found = compare(
        tmp_path, {"a": LOGITS, "n": LOGITS.argmax(1)}, {"a": LOGITS * 3, "n": other}
    ).fidelity()
    found[DETECTIONS] = Fidelity(DETECTIONS, 50, agreement=0.1)
    assert gate.what_is_wrong(found, 10.0) and gate.what_is_wrong(found, -100.0) is None


def test_limits():
    assert gate.limit_db("float32") == 50
    assert gate.limit_db("float32", has_tf32=True) == 40
    assert gate.limit_db("float32", computes_in="float16") == gate.limit_db("float16") == 30
    assert gate.limit_db("int8", computes_in="bfloat16") == 10
