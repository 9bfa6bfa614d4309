"""NaN, infinities and masks: compared by their place, and no screen for what lies beside them."""

import numpy as np
import pytest

from tests.measure.test_fidelity import compare
from tfopt.measure import gate, limits
from tfopt.measure.outputs import Kind

RNG = np.random.default_rng(4)
COUNT = 120
SCORES = (
    RNG.normal(size=(COUNT, 10)).astype(np.float32) + 5 * np.eye(10)[RNG.integers(10, size=COUNT)]
)
MASKED = RNG.uniform(size=SCORES.shape) < 0.3
LOGARITHMS = SCORES - np.log(np.exp(SCORES).sum(1, keepdims=True))
LOGARITHMS = np.where(LOGARITHMS < -7, -np.inf, LOGARITHMS)
HOLES = np.where(np.arange(COUNT)[:, None] % 10 == 3, np.nan, SCORES)


def reasons(folder, reference, candidate):
    found = compare(folder, {"o": reference}, {"o": candidate})
    wrong = {p: gate.what_is_wrong(found.fidelity(), db) for p, db in gate.LIMITS_DB.items()}
    return found, wrong


def masked(scores, by=-1e9):
    return np.where(MASKED, np.float32(by), scores).astype(np.float32)


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [
        (masked(SCORES), masked(-SCORES)),
        (masked(SCORES), masked(SCORES + 6 * RNG.normal(size=SCORES.shape))),
        (masked(SCORES), SCORES),
        (masked(SCORES, -np.inf), SCORES),
        (masked(SCORES, np.inf), masked(SCORES, -np.inf)),
        (LOGARITHMS, np.where(np.isinf(LOGARITHMS), 0, LOGARITHMS)),
    ],
)
def test_what_is_wrong_in_every_precision(reference, candidate, tmp_path):
    found, wrong = reasons(tmp_path, reference, candidate)
    assert all("'o' is not the model's: " in (reason or "") for reason in wrong.values()), wrong
    assert found.lost["o"].mean() > 0.05


def test_nan_that_became_a_number(tmp_path):
    found, wrong = reasons(tmp_path, HOLES, np.nan_to_num(HOLES))
    assert "12 of 120 examples have other values where the model has NaN" in wrong["float32"]
    assert all(wrong[name] for name in ("float16", "bfloat16", "int16x8"))
    np.testing.assert_array_equal(found.lost["o"], np.isnan(HOLES).any(1))


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [
        (masked(SCORES), (masked(SCORES) * (1 + 1e-7)).astype(np.float32)),
        (masked(SCORES), masked(SCORES, -65504).astype(np.float16)),
        (masked(SCORES), masked(SCORES, -np.inf).astype(np.float16)),
        (masked(SCORES, -np.inf), masked(SCORES, -3e38)),
        (masked(SCORES, np.inf), masked(SCORES, np.inf)),
        (LOGARITHMS, LOGARITHMS.astype(np.float16)),
        (HOLES, HOLES.astype(np.float16)),
    ],
)
def test_what_is_right(reference, candidate, tmp_path):
    found, wrong = reasons(tmp_path, reference, candidate)
    assert wrong["float16"] is None and wrong["int8"] is None
    assert found.lost["o"].mean() < 1e-3


def test_int8_has_its_lowest_step_for_minus_infinity(tmp_path):
    rounded = np.where(np.isinf(LOGARITHMS), -7.0, np.round(LOGARITHMS * 16) / 16)
    found, wrong = reasons(tmp_path, LOGARITHMS, rounded)
    assert found.fidelity()["o"].kind == Kind.CLASS_SCORES and wrong["int8"] is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([-1e9, -1e9 + 64, 0.5, 3], 5e8),
        ([1.7e9, 1.7e9 + 1e3, 1.6e9], np.inf),  # times
        ([1e9, 5e8, 2e8, 10, 300], np.inf),  # sales
        ([-1e9, 1, 2], np.inf),  # once could be an answer
        ([1, 2, np.nan, -np.inf], np.inf),
    ],
)
def test_what_a_mask_is(values, expected):
    assert limits.mask_of(np.array(values)) == pytest.approx(expected, rel=1e-3)
