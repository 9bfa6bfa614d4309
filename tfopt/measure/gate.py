"""Is a variant still the model that came in? Asked of every output, whatever the metric says."""

from __future__ import annotations

from collections.abc import Mapping

from tfopt.measure.comparing import DETECTIONS
from tfopt.measure.fidelity import Fidelity
from tfopt.measure.outputs import Kind

LIMITS_DB = {
    "float32": 50.0,  # rounding only; also of other processors' kernels
    "float16": 30.0,
    "bfloat16": 20.0,
    "int16x8": 20.0,
    "dynamic_range": 10.0,
    "int8": 10.0,
}
"""Least signal to noise of each output against the model as saved, by precision.

Rounding alone leaves some 6 dB for each bit of precision at each layer: trained networks were seen
at 90 dB and more in float32, 45 to 60 in float16, 30 to 45 in bfloat16 and 15 to 35 in int8.
"""
TF32_DB = 40.0  # float32 on NVIDIA GPUs since Ampere, which have ten bits of mantissa
TRIMMED_MIN_DB = 10.0  # of all examples, where those that fell the other way are set aside
ROUNDING_DB = 100.0  # relative to an output's size: float32 rounding and nothing else
PROBABILITY_STEPS = 2 / 256  # int8 has probabilities in steps of 1/256
CHANNEL_DB = 3.0
FOUND_AGAIN = 0.5


def limit_db(precision: str, computes_in: str = "float32", has_tf32: bool = False) -> float:
    """The least signal to noise ratio of a precision, in decibels.

    Args:
      precision: of the variant.
      computes_in: what the model as saved computes in; rounding of its own counts, too.
      has_tf32: whether float32 is computed in TF32.
    """
    limits = [LIMITS_DB[precision], LIMITS_DB.get(computes_in, LIMITS_DB["float32"])]
    return min([*limits, *([TF32_DB] if has_tf32 else [])])


def what_is_wrong(found: Mapping[str, Fidelity], min_db: float | None) -> str | None:
    """Why a variant is not the model any more, in one sentence, or None.

    Args:
      found: how near each output comes; the key `DETECTIONS` stands for those of a detector.
      min_db: the least signal to noise ratio; None for a model that is another by intention, such
        as a distilled student: then only shapes, NaN and constants are looked at.
    """
    reasons = []
    for name, fidelity in found.items():
        what = "The detections are" if name == DETECTIONS else f"Output {name!r} is"
        if reason := _broken(fidelity) or (None if min_db is None else _beyond(fidelity, min_db)):
            reasons.append((fidelity.sqnr_db, f"{what} not the model's: {reason}."))
    return min(reasons)[1] if reasons else None


def _broken(found: Fidelity) -> str | None:
    """What no precision explains."""
    of = f"of {found.num_examples} examples"
    if found.num_not_finite:
        return f"{found.num_not_finite} {of} hold NaN or infinity where the model has numbers"
    if found.is_constant:
        return f"it is the same for all {found.num_examples} examples and the model's varies"
    is_other = found.num_examples and found.num_other_shapes == found.num_examples
    if is_other and not found.is_detected:
        return "it is missing" if found.shapes == "missing" else f"its shape is {found.shapes}"
    if found.dtypes:
        return f"its dtype is {found.dtypes}"
    return None


def _beyond(found: Fidelity, min_db: float) -> str | None:
    """What is more than a precision explains."""
    # As a share of examples or numbers: 0.3 % for 50 dB, a tenth for 20, all of them for 0.
    share = 10 ** (-min_db / 20)
    allowed = max(share, 1 / max(1, found.num_examples))
    needed = f"at least {min_db:g} dB are expected; min_sqnr_db sets another limit"
    if found.kind == DETECTIONS:
        if 1 - found.agreement > allowed:
            return (
                f"{found.agreement:.1%} of its boxes are found again, {1 - allowed:.1%} are "
                "expected; min_sqnr_db sets another limit"
            )
        if found.found_again < min(FOUND_AGAIN, 1 - share):
            of_class = f"of its boxes of class {found.lost_number:g}"
            return f"{found.found_again:.1%} {of_class} are found again"
        return None
    is_exact = min_db >= TF32_DB
    trimmed_db = found.nearly_all_sqnr_db if is_exact else found.trimmed_sqnr_db
    is_near = found.sqnr_db >= min_db or (
        trimmed_db >= min_db and found.sqnr_db >= min(min_db, TRIMMED_MIN_DB)
    )
    if found.is_detected:
        what = f"in boxes that are found again it is {found.sqnr_db:.1f} dB above the error"
        return None if is_near else f"{what}, and {needed}"
    if found.num_other_shapes > allowed * found.num_examples:
        return (
            f"{found.num_other_shapes} of {found.num_examples} examples have another shape, such "
            f"as {found.shapes}"
        )
    if found.num_other_limits > max(1.0, share**2 * found.num_examples):
        return (
            f"{found.num_other_limits} of {found.num_examples} examples have other values where "
            "the model has NaN, infinity or masked values; min_sqnr_db sets another limit"
        )
    if found.kind in (Kind.NUMBERS, Kind.TEXT):
        if found.differing > allowed:
            return f"{found.differing:.1%} of it differs, {allowed:.1%} may; {needed}"
        if found.found_again < min(FOUND_AGAIN, 1 - share):
            return f"{found.lost_number:g} is found again in {found.found_again:.1%} of cases only"
        return None
    is_rounding = (
        found.relative_db >= ROUNDING_DB
        if is_exact
        else found.is_probability and found.max_abs_error <= PROBABILITY_STEPS
    )
    if not (is_near or is_rounding):
        return f"its signal is {found.sqnr_db:.1f} dB above the error, and {needed}"
    if found.usual_sqnr_db < min(CHANNEL_DB, min_db) and not is_rounding:
        return (
            f"without its outliers, its signal is {found.usual_sqnr_db:.1f} dB above the "
            "error; min_sqnr_db sets another limit"
        )
    if found.channel_db < min(CHANNEL_DB, min_db) and not is_rounding:
        return (
            f"the signal of channel {found.channel} is {found.channel_db:.1f} dB above the error; "
            f"min_sqnr_db sets another limit"
        )
    return None
