"""What a step of distillation costs.

Targets: at most 1.03 times a step written by hand with the same mathematics; with the teacher kept
on disk at most 1.05 times the student's own step on labels, reading included; with a feature loss
and the teacher kept on disk at least 1.3 times as fast as keras.distillation with the same two
models and losses. And memory that does not grow with the number of examples that are kept.

Steps of all of them in random order in one process, stochastic gradient descent with momentum, soft
targets and attention transfer between the last feature maps.

    python scripts/benchmarks/distillation_speed.py --teacher=wrn16_4.keras \
        --student=resnet20.keras --data=cifar10_small.npz --output=distillation_speed.json

It takes 8 minutes on two cores. The data: an .npz with x_train and y_train.
"""

import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import reporting
from absl import flags

import tfopt
from tfopt.distillation.losses import AttentionTransfer
from tfopt.measure import environment, latency
from tfopt.train import layer_times

_TEACHER = flags.DEFINE_string("teacher", None, "A .keras file.", required=True)
_STUDENT = flags.DEFINE_string("student", None, "A .keras file.", required=True)
_DATA = flags.DEFINE_string("data", None, "Training images and labels.", required=True)
_FEATURES = flags.DEFINE_list(
    "features", ["re_lu_18", "re_lu_12"], "A layer of the student and one of the teacher."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Examples in a step.", lower_bound=1)
_NUM_EXAMPLES = flags.DEFINE_integer("num_examples", 2048, "Kept on disk.", lower_bound=64)
_JIT_COMPILE = flags.DEFINE_bool("jit_compile", False, "Compile steps with XLA.")
_CALLS = flags.DEFINE_integer(
    "calls", 1, "Steps in one timed call; several on a GPU, which runs behind.", lower_bound=1
)
_MAX_TIMING_S = flags.DEFINE_float("max_timing_s", 120.0, "For each comparison.")
_OUTPUT = reporting.define_output()

_TEMPERATURE = 4.0
_ALPHA = 0.1
_MAX_GROWTH_BYTES = 32 << 20


def main(_: list[str]) -> None:
    """Times and prints."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with np.load(_DATA.value) as archive:
        images = archive["x_train"][: _NUM_EXAMPLES.value]
        labels = archive["y_train"][: _NUM_EXAMPLES.value].ravel().astype(np.int32)
    work = pathlib.Path(tempfile.mkdtemp())
    try:
        growth = _growth(work)  # first, since peaks stay
        results = [
            _compare("step, teacher asked", _asked(images, labels), 1.03, is_cost=True),
            _compare("step, teacher kept", _kept(images, labels, work), 1.05, is_cost=True),
            _compare(
                "features, teacher asked", _features(images, labels, None), None, is_cost=False
            ),
            _compare("features, teacher kept", _features(images, labels, work), 1.3, is_cost=False),
        ]
    finally:
        shutil.rmtree(work)
    rows = [("case", "figure", "estimate", "low", "high", "target")]
    for found in results:
        target = "" if found["target"] is None else found["target"]
        word = "" if found["target"] is None else f" {reporting.met(found['is_met'])}"
        shown = (f"{found[name]:.3f}" for name in ("estimate", "low", "high"))
        rows.append((found["case"], found["figure"], *shown, f"{target}{word}"))
    is_small = growth <= _MAX_GROWTH_BYTES
    shown = f"{growth / 2**20:.1f} MiB"
    limit = f"{_MAX_GROWTH_BYTES / 2**20:.0f} MiB {reporting.met(is_small)}"
    rows.append(("memory", "20 times the examples", shown, "", "", limit))
    print(f"\n{reporting.format_table(rows)}")
    reporting.save(
        _OUTPUT.value,
        {
            "benchmark": "distillation_speed",
            "teacher": _TEACHER.value,
            "student": _STUDENT.value,
            "batch_size": _BATCH_SIZE.value,
            "jit_compile": _JIT_COMPILE.value,
            "calls": _CALLS.value,
            "growth_bytes": growth,
            "is_met": is_small and all(found["is_met"] for found in results),
            "cases": results,
        },
    )


def _compare(
    case: str, steps: dict[str, Callable[[], Any]], target: float | None, is_cost: bool
) -> dict[str, Any]:
    """How long the first of two takes, in times of the second; or how much faster it is."""
    timings = layer_times.time_steps(steps, max_s=_MAX_TIMING_S.value, interval_width=0.01)
    ours, other = list(steps)
    fast, slow = (other, ours) if is_cost else (ours, other)
    found = latency.speedup(timings[slow], timings[fast])
    is_met = target is None or (found.estimate <= target if is_cost else found.estimate >= target)
    word = "takes" if is_cost else "is as fast as"
    print(f"{case}: {found.estimate:.3f} ({found.low:.3f} to {found.high:.3f})", flush=True)
    return {
        "case": case,
        "figure": f"times {other}" if is_cost else f"{word} {other}, times",
        "estimate": found.estimate,
        "low": found.low,
        "high": found.high,
        "target": target,
        "is_met": is_met,
        "other_s": timings[other].median_s,
        "steal_share": timings[other].steal_share,
    }


def _asked(images: np.ndarray, labels: np.ndarray) -> dict[str, Callable[[], Any]]:
    return {
        "tfopt.Distiller": _fitting(_distiller(), _plain_batches(images, labels)),
        "a step by hand": _by_hand(images, labels),
    }


def _kept(
    images: np.ndarray, labels: np.ndarray, work: pathlib.Path
) -> dict[str, Callable[[], Any]]:
    distiller = _distiller()
    kept = distiller.cached((images, labels), work / "outputs", batch_size=_BATCH_SIZE.value)
    kept.fill()
    student = _load(_STUDENT.value)
    student.compile(**_options())
    return {
        "tfopt.Distiller": _fitting(distiller, kept.dataset().repeat()),
        "the student's own step": _fitting(student, _plain_batches(images, labels)),
    }


def _features(
    images: np.ndarray, labels: np.ndarray, work: pathlib.Path | None
) -> dict[str, Callable[[], Any]]:
    mine, theirs = _FEATURES.value
    distiller = _distiller([tfopt.FeaturePair(mine, theirs, AttentionTransfer(), 1.0)])
    batches = _plain_batches(images, labels)
    if work is not None:
        kept = distiller.cached((images, labels), work / "features", batch_size=_BATCH_SIZE.value)
        kept.fill()
        batches = kept.dataset().repeat()
    return {
        "tfopt.Distiller": _fitting(distiller, batches),
        "keras.distillation": _fitting(_of_keras(), _plain_batches(images, labels)),
    }


def _load(path: str) -> Any:
    import keras

    return keras.models.load_model(path, compile=False)


def _options() -> dict[str, Any]:
    import keras

    return {
        "optimizer": keras.optimizers.SGD(1e-4, momentum=0.9),
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "jit_compile": _JIT_COMPILE.value,
    }


def _distiller(features: Any = ()) -> Any:
    found = tfopt.Distiller(
        _load(_STUDENT.value),
        _load(_TEACHER.value),
        alpha=_ALPHA,
        temperature=_TEMPERATURE,
        features=features,
    )
    found.compile(**_options())
    return found


def _of_keras() -> Any:
    """keras.distillation with the same losses: its divergence as a class, and T² as a weight."""
    import keras

    class OfMaps(keras.losses.Loss):
        def call(self, y_true: Any, y_pred: Any) -> Any:
            return AttentionTransfer()(y_pred, y_true)

    mine, theirs = _FEATURES.value
    found = keras.distillation.Distiller(
        _load(_TEACHER.value),
        _load(_STUDENT.value),
        [
            keras.distillation.LogitsDistillation(_TEMPERATURE, keras.losses.KLDivergence()),
            keras.distillation.FeatureDistillation(OfMaps(), theirs, mine),
        ],
        distillation_loss_weights=[1.0, 1.0],
        student_loss_weight=_ALPHA,
    )
    found.compile(**_options())
    return found


def _by_hand(images: np.ndarray, labels: np.ndarray) -> Callable[[], Any]:
    import keras
    import tensorflow as tf

    teacher, student = _load(_TEACHER.value), _load(_STUDENT.value)
    optimizer = keras.optimizers.SGD(1e-4, momentum=0.9)
    optimizer.build(student.trainable_variables)

    @tf.function(jit_compile=_JIT_COMPILE.value)
    def step(x: Any, y: Any) -> Any:
        target = tf.nn.softmax(teacher(x, training=False) / _TEMPERATURE)
        with tf.GradientTape() as tape:
            logits = student(x, training=True)
            hard = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
            soft = tf.nn.softmax_cross_entropy_with_logits(target, logits / _TEMPERATURE)
            soft -= tf.nn.softmax_cross_entropy_with_logits(target, tf.math.log(target + 1e-30))
            loss = _ALPHA * tf.reduce_mean(hard)
            loss += (1 - _ALPHA) * _TEMPERATURE**2 * tf.reduce_mean(soft)
            for each in student.losses:
                loss += each
        variables = student.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    batches = iter(_plain_batches(images, labels))

    def run() -> None:
        for _ in range(_CALLS.value):
            step(*next(batches))

    return run


def _plain_batches(images: np.ndarray, labels: np.ndarray) -> Any:
    import tensorflow as tf

    found = tf.data.Dataset.from_tensor_slices((images, labels)).shuffle(len(images))
    return found.batch(_BATCH_SIZE.value, drop_remainder=True).repeat().prefetch(2)


def _fitting(model: Any, batches: Any) -> Callable[[], Any]:
    """Steps of `fit`, with what reading batches costs."""
    first = next(iter(batches))
    if isinstance(model, tfopt.Distiller):
        inputs = first[0]
        model.examine(inputs["inputs"] if isinstance(inputs, dict) else inputs)
    elif not model.built:
        model(first[0])
    model.make_train_function()
    iterator = iter(batches)

    def run() -> None:
        for _ in range(_CALLS.value):
            model.train_function(iterator)

    return run


def _growth(work: pathlib.Path) -> int:
    """By how much the peak of memory grows with 20 times as many kept examples."""
    from tfopt.distillation.cache import cached

    def read(num_examples: int, num_passes: int, name: str) -> int:
        import tensorflow as tf

        data = tf.data.Dataset.range(num_examples).map(lambda index: tf.fill([4], index))
        kept = cached(
            data.batch(64),
            lambda x: {"logits": tf.tile(tf.cast(x, tf.float32), [1, 250])},
            work / name,
            identity={},
            batch_size=64,
        )
        kept.fill()
        for _ in range(num_passes):
            for _ in kept.dataset():
                pass
        return environment.peak_resident_bytes()

    # As many batches of both, since peaks grow with time, too. Of fewer, the pages around the rows
    # of a batch, which the system maps with them, would be the whole file.
    before = read(5_000, 20, "few")
    return max(0, read(100_000, 1, "many") - before)


if __name__ == "__main__":
    reporting.run_app(main)
