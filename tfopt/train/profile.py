"""What half precision gains and costs layer by layer, and the choice that follows from it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tfopt.errors import InputError, first_line
from tfopt.measure import latency, statistics
from tfopt.progress import Progress
from tfopt.train import copies, layer_times
from tfopt.train.assignment import Edge, Unit, assign, error_of
from tfopt.train.batches import batches
from tfopt.train.choice import why_float32
from tfopt.train.layers import (
    Layer,
    Pattern,
    Patterns,
    check_built,
    framework_of,
    policy_name,
    set_policy,
    walk,
)
from tfopt.train.precision import check_policy
from tfopt.train.recommendation import recommend_precision

if TYPE_CHECKING:
    import pandas as pd

MAX_ERROR = 0.05
NUM_EXAMPLES_FOR_ERRORS = 16
STEP_MAX_S = 12.0


@dataclasses.dataclass(frozen=True)
class PrecisionProfile:
    """What was measured, and what to pass to `set_precision`.

    Attributes:
      policy: `mixed_bfloat16` or `mixed_float16`; float32 when no choice of layers is faster.
      keep_float32: layers that stay in float32, besides those that always do.
      table: one row for each layer that may compute in either: `layer` (its path), `dtype` (the
        one chosen), `time_share` (of the sum of all layers in float32, 0…1), `speedup`,
        `speedup_low` and `speedup_high` (of the layer by half precision, without casts; 95 %),
        `error` (of the model's outputs when this layer alone computes in half precision: root
        mean square, relative to their spread) and `reason`. What was not measured is empty.
      speedup: of the whole model over float32, with its 95 % interval; of a training step unless
        inference was asked for.
      global_speedup: the same of the policy with its defaults alone; None where that has more
        error than is allowed.
      error: of the outputs with the layers as chosen, as in the table.
    """

    policy: str
    keep_float32: tuple[Pattern, ...]
    table: pd.DataFrame
    speedup: statistics.Interval
    global_speedup: statistics.Interval | None
    error: float

    def __str__(self) -> str:
        shown = self.table.copy()
        shown["time_share"] = shown.time_share.map("{:.1%}".format, na_action="ignore")
        for name in ("speedup", "speedup_low", "speedup_high"):
            shown[name] = shown[name].map("{:.2f}".format, na_action="ignore")
        shown["error"] = shown.error.map("{:.2g}".format, na_action="ignore")
        return f"{shown.fillna('').to_string(index=False)}\n\n{self.summary}"

    @property
    def summary(self) -> str:
        """Two sentences."""
        half = (self.table.dtype != "float32").sum()
        found = f"{half} of {len(self.table)} layers in half precision: {_times(self.speedup)}"
        if self.global_speedup is not None:
            found += f"; the policy with its defaults alone: {_times(self.global_speedup)}"
        return f"{found}. The outputs are off by {self.error:.2g} of their spread."


def profile_precision(
    model: Layer,
    data: Any,
    policy: str | None = None,
    *,
    max_error: float = MAX_ERROR,
    keep_float32: Sequence[Pattern] = (),
    for_training: bool = True,
    batch_size: int = 32,
    quiet: bool = False,
) -> PrecisionProfile:
    """Measures each layer in float32 and in half precision, and chooses those that gain most.

        profile = tfopt.profile_precision(model, images, "mixed_bfloat16")
        print(profile)
        model = tfopt.set_precision(model, profile.policy, profile.keep_float32)

    Each layer is timed on what it gets inside the model, casts between layers once for their mean
    size. The choice is the fastest sum of layers and casts whose error is allowed (see
    `tfopt.train.assignment`); then whole models are timed side by side, and the choice is only
    taken if it is faster than the policy with its defaults, beyond its interval. Compilers fuse
    layers, so that the time of a layer by itself says less the more is fused.

    The model is not changed. It takes a second or two for each kind of layer, and a forward pass on
    16 examples for each layer. Errors of gradients are not looked at: see `PrecisionWatch`.

    Args:
      model: a built Keras 3 or tf_keras model; XLA is used if it was compiled with
        `jit_compile=True`.
      data: arrays or batches as `fit` takes them; one batch is used.
      policy: `mixed_bfloat16` or `mixed_float16`; what `recommend_precision` says by default.
      max_error: that half precision may cause in the outputs, as a share of their spread:
        sqrt(mean((half − float32)²) / variance(float32)), of the worst output.
      keep_float32: layers that stay in float32 in any case, as `set_precision` takes them.
      for_training: time forward and backward passes; else inference.
      batch_size: examples in the batch that is timed.
      quiet: print no progress.

    Raises:
      InputError: when the policy is unknown or none is recommended, the model is not built or
        cannot be copied, or there are no data.
    """
    framework_of(model)
    check_built(model)
    policy = _chosen_policy(policy)
    if not max_error >= 0:
        raise InputError(f"max_error is {max_error}; expected 0 or more, such as 0.05.")
    inputs = _first_batch(data, batch_size)
    progress = Progress(quiet)
    try:
        return _Profiler(model, inputs, policy, keep_float32, for_training, progress).run(max_error)
    finally:
        progress.close()


@dataclasses.dataclass
class _Found:
    """What is known of one unit."""

    path: str  # in the model that came
    origin: Layer | None  # there
    default: str | None  # why it stays in float32 by default
    time: layer_times.LayerTime | None = None
    error: float = math.nan
    problem: str = ""


class _Profiler:
    """Holds a copy in float32 and one in half precision."""

    def __init__(
        self,
        model: Layer,
        inputs: Any,
        policy: str,
        keep_float32: Sequence[Pattern],
        for_training: bool,
        progress: Progress,
    ):
        self.model, self.inputs, self.policy = model, inputs, policy
        self.keep_float32 = tuple(
            [keep_float32] if isinstance(keep_float32, (str, type)) else keep_float32
        )
        self.for_training, self.progress = for_training, progress
        self.jit_compile = getattr(model, "jit_compile", None) is True
        self.dtype = policy.removeprefix("mixed_")
        self.kept = why_float32([model], Patterns(self.keep_float32), is_strict=True)
        self.float32 = self._copy("float32", set())
        self.half = self._copy(policy, set())
        self.units = [place.layer for place in layer_times.units(self.float32)]
        self.twins = [
            [(layer, policy_name(layer)) for layer in layer_times.whole(place.layer)]
            for place in layer_times.units(self.half)
        ]
        origins = {id(place.layer): origin for place, origin in copies.matched(self.float32, model)}
        self.found = []
        for place in layer_times.units(self.float32):
            origin = origins[id(place.layer)]
            path = place.path if origin is None else origin.path
            layer = None if origin is None else origin.layer
            self.found.append(_Found(path, layer, self.kept.get(id(layer))))

    def run(self, max_error: float) -> PrecisionProfile:
        calls = layer_times.record_calls(self.float32, self.units, self.inputs, self.for_training)
        self._time_layers(calls)
        self._find_errors()
        cast_s = layer_times.time_cast(
            size := layer_times.mean_size(calls), self.dtype, self.for_training, self.jit_compile
        )
        edges = [
            Edge(producer, consumer, cast_s * elements / size)
            for consumer, found in enumerate(calls)
            for call in found
            for producer, elements in call.sources
            if producer != consumer
        ]
        units = [self._unit(found) for found in self.found]
        allowed = {index for index, unit in enumerate(units) if math.isfinite(unit.half_s)}
        return self._decide(units, edges, allowed, max_error)

    def _time_layers(self, calls: Sequence[Sequence[layer_times.Call]]) -> None:
        """Fills in times; layers that are alike are timed once."""
        by_key: dict[str, layer_times.LayerTime | str] = {}
        keys = [
            f"{layer_times.key(unit, layer_calls)} {found.default}"
            for unit, layer_calls, found in zip(self.units, calls, self.found, strict=True)
        ]
        self.progress.start(len(set(keys)))
        for unit, twin, found, name, layer_calls in zip(
            self.units, self.twins, self.found, keys, calls, strict=True
        ):
            if not layer_calls:
                found.problem = "is not called"
                continue
            if name not in by_key:
                self.progress.doing(found.path)
                layers = {"float32": unit} | ({} if found.default else {self.dtype: twin[0][0]})
                try:
                    time = layer_times.time_layer(
                        layers, layer_calls, self.for_training, self.jit_compile
                    )
                    by_key[name] = time
                    gain = time.speedup
                    told = f"{gain.estimate:.2f} times as fast" if gain else "stays in float32"
                except Exception as error:  # a layer of the user's raises whatever it raises
                    by_key[name] = told = f"cannot be timed: {first_line(error)}"
                self.progress.finish(f"{found.path}: {told}")
            result = by_key[name]
            if isinstance(result, str):
                found.problem = result
            else:
                found.time = result

    def _find_errors(self) -> None:
        """Fills in the errors of the outputs with one layer in half precision at a time."""
        for copy in (self.float32, self.half):
            copy.set_weights(self.model.get_weights())  # training steps moved statistics
        self._set_half(set())
        reference = _outputs(self.float32, self._few)
        ahead = [index for index, found in enumerate(self.found) if not found.default]
        for index in ahead:
            found = self.found[index]
            self.progress.doing(f"error of {found.path}")
            self._set_half({index})
            try:
                found.error = relative_error(reference, _outputs(self.half, self._few))
            except Exception as error:
                found.error, found.problem = math.inf, f"fails: {first_line(error)}"

    @functools.cached_property
    def _few(self) -> Any:
        import tensorflow as tf

        return tf.nest.map_structure(lambda value: value[:NUM_EXAMPLES_FOR_ERRORS], self.inputs)

    def _unit(self, found: _Found) -> Unit:
        if found.time is None:
            return Unit(0.0, math.inf, 0.0)
        if found.time.speedup is None:
            return Unit(found.time.float32_s, math.inf, 0.0)
        half_s = found.time.float32_s / found.time.speedup.estimate
        return Unit(found.time.float32_s, half_s, found.error)

    def _decide(
        self, units: Sequence[Unit], edges: Sequence[Edge], allowed: set[int], max_error: float
    ) -> PrecisionProfile:
        """Times whole models; takes the choice where it is faster."""
        everything = {index for index in allowed if math.isfinite(units[index].error)}
        chosen, error = self._within(units, edges, max_error)
        all_error = self._error(everything)
        candidates = {"float32": set[int](), "chosen": chosen}
        if all_error <= max_error and everything == allowed:
            candidates["global"] = everything
        timings = self._time_models(candidates)
        speedups = {
            name: latency.speedup(timings["float32"], timing) for name, timing in timings.items()
        }
        best, assigned = "chosen", chosen
        if "global" in timings:
            over_global = latency.speedup(timings["global"], timings["chosen"])
            if not over_global.low > 1:
                best, chosen, error = "global", everything, all_error
        if not speedups[best].low > 1:
            best, chosen, error = "float32", set(), 0.0
        reasons = [
            self._reason(found, index in chosen, index in assigned, bool(chosen))
            for index, found in enumerate(self.found)
        ]
        overall = speedups[best], speedups.get("global")
        return self._profile(units, chosen, reasons, *overall, error)

    def _within(
        self, units: Sequence[Unit], edges: Sequence[Edge], max_error: float
    ) -> tuple[set[int], float]:
        """The choice, and its error as measured, which is allowed.

        Errors of layers that depend on each other add up to more than they would by chance.
        """
        allowance = max_error
        while True:
            chosen = assign(units, edges, allowance)
            error = self._error(chosen)
            if error <= max_error:
                return chosen, error
            if not allowance:
                return set(), 0.0
            allowance = 0.9 * min(allowance, error_of(units, chosen)) * max_error / error

    def _error(self, half: set[int]) -> float:
        """Of the outputs with these layers in half precision."""
        self._set_half(half)
        reference = _outputs(self.float32, self._few)
        return relative_error(reference, _outputs(self.half, self._few))

    def _set_half(self, half: set[int]) -> None:
        """The copy in half precision computes so in these units only."""
        for index, twin in enumerate(self.twins):
            for layer, policy in twin:
                set_policy(layer, policy if index in half else "float32")

    def _time_models(self, candidates: dict[str, set[int]]) -> dict[str, latency.Timing]:
        self.progress.say("Timing whole models side by side …")
        steps, seen = {}, dict[frozenset[int], str]()
        for name, half in candidates.items():
            if frozenset(half) not in seen:
                seen[frozenset(half)] = name
                model = self._copy(self.policy, set(range(len(self.units))) - half)
                steps[name] = layer_times.model_step(
                    model, self.inputs, self.for_training, self.jit_compile
                )
        timings = layer_times.time_steps(steps, max_s=STEP_MAX_S)
        return {name: timings[seen[frozenset(half)]] for name, half in candidates.items()}

    def _copy(self, policy: str, kept: set[int]) -> Layer:
        """A copy in which these units, and those that stay by default, are float32."""
        inside = set(self.kept)
        for index in kept:
            inside |= {id(layer) for layer in layer_times.whole(self.found[index].origin)}
        names = {
            id(place.layer): "float32" if id(place.layer) in inside else policy
            for place in walk(self.model)
        }
        return copies.copy_with_policies(self.model, names, policy)

    def _profile(
        self,
        units: Sequence[Unit],
        half: set[int],
        reasons: Sequence[str],
        speedup: statistics.Interval,
        global_speedup: statistics.Interval | None,
        error: float,
    ) -> PrecisionProfile:
        import pandas as pd

        total_s = sum(unit.float32_s for unit in units)
        rows, kept = [], list(self.keep_float32)
        for index, (unit, found) in enumerate(zip(units, self.found, strict=True)):
            time = found.time
            gain = None if time is None else time.speedup
            if index not in half and not found.default and half:
                kept.append(found.path)
            rows.append(
                {
                    "layer": found.path,
                    "dtype": self.dtype if index in half else "float32",
                    "time_share": None if time is None else unit.float32_s / total_s,
                    "speedup": None if gain is None else gain.estimate,
                    "speedup_low": None if gain is None else gain.low,
                    "speedup_high": None if gain is None else gain.high,
                    "error": found.error,
                    "reason": reasons[index],
                }
            )
        return PrecisionProfile(
            self.policy if half else "float32",
            tuple(kept) if half else (),
            pd.DataFrame(rows),
            speedup,
            global_speedup,
            error,
        )

    def _reason(self, found: _Found, is_half: bool, is_assigned: bool, is_any_half: bool) -> str:
        if found.default:
            return f"stays: {found.default}"
        if found.problem:
            return found.problem
        if not is_any_half:
            return "no choice of layers is faster than float32"
        assert found.time is not None and found.time.speedup is not None
        gain = found.time.speedup
        if is_half and not is_assigned:
            return "the whole model was not faster with it in float32"
        if is_half:
            return "gains" if gain.low > 1 else "casts to float32 and back would cost more"
        if not math.isfinite(found.error):
            return "its values leave the range of half precision"
        if gain.low > 1:
            return "its error, or casts around it, cost more than it gains"
        return "loses time" if gain.high < 1 else "gains nothing"


def relative_error(reference: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> float:
    """Root mean square of the difference, relative to the spread of the reference.

    Of several outputs the worst counts; infinite where an output is not finite.
    """
    worst = 0.0
    for expected, value in zip(reference, outputs, strict=True):
        if not np.all(np.isfinite(value)):
            return math.inf
        power = float(np.mean((value - expected) ** 2))
        spread = float(np.var(expected)) or float(np.mean(expected**2))
        worst = max(worst, math.sqrt(power / spread) if spread else math.inf if power else 0.0)
    return worst


def _outputs(model: Layer, inputs: Any) -> list[np.ndarray]:
    import tensorflow as tf

    outputs = tf.nest.flatten(model(inputs, training=False))
    return [np.asarray(tf.cast(value, tf.float32), np.float64) for value in outputs]


def _first_batch(data: Any, batch_size: int) -> Any:
    import tensorflow as tf

    for batch in batches(data, batch_size):
        return tf.nest.map_structure(tf.convert_to_tensor, batch)
    raise InputError("There are no data to run the model on; expected a batch at least.")


def _chosen_policy(policy: str | None) -> str:
    if policy is None:
        advice = recommend_precision()
        if advice.policy == "float32":
            raise InputError(
                f"Half precision is not recommended here: {advice.reason} Name a policy to measure "
                "it all the same."
            )
        return advice.policy
    check_policy(policy)
    if policy == "float32":
        raise InputError(
            "The policy is 'float32'; expected mixed_bfloat16 or mixed_float16 to compare with it."
        )
    return policy


def _times(speedup: statistics.Interval) -> str:
    return (
        f"{speedup.estimate:.2f} ({speedup.low:.2f} to {speedup.high:.2f}) times as fast as float32"
    )
