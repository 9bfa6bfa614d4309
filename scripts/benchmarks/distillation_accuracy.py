"""What a student gains from its teachers, on CIFAR-10.

Targets, in points of top-1 on the test images, with paired 95 % intervals over seeds: distilling
resnet20 from wrn16_4 with the 10,000 training images and their labels gains at least 1 over the
same training from labels alone; with 1,000 labels and 9,000 images without, at least 5 over the
1,000 alone; two teachers lose at most half a point to the better one. For gains the interval lies
above 0 and its middle above the figure; for the loss the interval's middle is at most half a point.

The teachers of --teachers were fitted to these very images (top-1 1.0 on x_train), so that what
they say about them as they are is little more than the labels: images are augmented (crops with a
margin of 4 pixels, flips), and student and teachers see the same view. What is compared is the
training of one student by two ways, on the same number of steps, views and initial weights; it says
nothing about a teacher that has never seen the images.

Schedule of all: 3,120 steps of 128 images, stochastic gradient descent with Nesterov momentum 0.9,
learning rate 0.1 that falls to 0 along a cosine, weight decay 5e-4. Distillation: soft targets,
temperature 4, alpha 0.1.

    python scripts/benchmarks/distillation_accuracy.py --data=cifar10_small.npz \
        --teachers=wrn16_4.keras,resnet20.keras --work_dir=runs --output=accuracy.json

The data: an .npz with x_train (10000, 32, 32, 3) uint8, y_train, x_test, y_test. A seed takes
minutes on a GPU with --jit_compile, and hours on two cores. Each training is a line in --work_dir,
so that it can be interrupted, and several processes can share the work by --cases.
"""

import json
import os
import pathlib
from typing import Any

import example_models
import numpy as np
import reporting
from absl import flags

import tfopt
from tfopt.distillation.views import CropAndFlip

CASES = {
    # name: share of labelled images, number of teachers
    "labels": (1.0, 0),
    "distilled": (1.0, 1),
    "few labels": (0.1, 0),
    "few labels, distilled": (0.1, 1),
    "two teachers": (1.0, 2),
}
COMPARISONS = (
    # gain of the first over the second, at least
    ("distilled", "labels", 0.01),
    ("few labels, distilled", "few labels", 0.05),
    ("two teachers", "distilled", -0.005),
)

_DATA = flags.DEFINE_string("data", None, "Training and test images.", required=True)
_TEACHERS = flags.DEFINE_list(
    "teachers", None, "The better one and another, .keras files.", required=True
)
_WORK_DIR = flags.DEFINE_string("work_dir", None, "Folder of finished runs.", required=True)
_CASES = flags.DEFINE_list(
    "cases", list(range(len(CASES))), "Which, by their places, this process trains."
)
_SEEDS = flags.DEFINE_integer("seeds", 10, "Of each case.", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", 3120, "Of each training.", lower_bound=1)
_JIT_COMPILE = flags.DEFINE_bool("jit_compile", False, "Compile steps with XLA.")
_STEPS_PER_EXECUTION = flags.DEFINE_integer(
    "steps_per_execution", 1, "Steps between two looks at the results; many on a GPU."
)
_OUTPUT = reporting.define_output()

_BATCH_SIZE = 128
_ALPHA, _TEMPERATURE = 0.1, 4.0
_MOMENTUM = 0.99  # of batch normalisation


def main(_: list[str]) -> None:
    """Trains what is not in the work folder yet, and compares what is."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    folder = pathlib.Path(_WORK_DIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    with np.load(_DATA.value) as archive:
        data = {name: archive[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    mine = [list(CASES)[int(place)] for place in _CASES.value]
    trainers: dict[str, _Trainer] = {}
    for seed in range(_SEEDS.value):
        for case in mine:
            # A file for each case, so that processes do not write into one another's lines.
            file = folder / f"{list(CASES).index(case)}_{_STEPS.value}.jsonl"
            if any(run["seed"] == seed for run in _read(file)):
                continue
            if case not in trainers:
                trainers[case] = _Trainer(case)
            run = {"case": case, "seed": seed, "accuracy": trainers[case].train(data, seed)}
            with file.open("a") as lines:
                lines.write(json.dumps(run) + "\n")
            print(run, flush=True)
    runs = [run for file in sorted(folder.glob(f"*_{_STEPS.value}.jsonl")) for run in _read(file)]
    results = [found for each in COMPARISONS if (found := _compare(runs, *each)) is not None]
    rows = [("case", "against", "seeds", "top-1", "gain", "low", "high", "target")]
    for found in results:
        shown = (f"{found[name]:.4f}" for name in ("accuracy", "gain", "low", "high"))
        target = f"{found['target']} {reporting.met(found['is_met'])}"
        rows.append((found["case"], found["against"], found["num_seeds"], *shown, target))
    print(f"\n{reporting.format_table(rows)}")
    reporting.save(
        _OUTPUT.value,
        {
            "benchmark": "distillation_accuracy",
            "teachers": _TEACHERS.value,
            "steps": _STEPS.value,
            "is_met": len(results) == len(COMPARISONS) and all(r["is_met"] for r in results),
            "cases": results,
            "runs": runs,
        },
    )


class _Trainer:
    """A student that is trained again and again, compiled once."""

    def __init__(self, case: str):
        import keras

        self._labelled, num_teachers = CASES[case]
        self._student = example_models.resnet20(_MOMENTUM)
        self._model: Any = self._student
        if num_teachers:
            self._model = tfopt.Distiller(
                self._student,
                _TEACHERS.value[:num_teachers],
                alpha=_ALPHA,
                temperature=_TEMPERATURE,
            )
        optimizer = keras.optimizers.SGD(
            keras.optimizers.schedules.CosineDecay(0.1, _STEPS.value),
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
        )
        optimizer.build(self._student.trainable_variables)
        self._model.compile(
            optimizer,
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            jit_compile=_JIT_COMPILE.value,
            steps_per_execution=_STEPS_PER_EXECUTION.value,
        )
        self._optimizer = optimizer
        self._initial = [np.array(value) for value in optimizer.variables]

    def train(self, data: dict[str, np.ndarray], seed: int) -> float:
        """Returns the accuracy on test images."""
        import keras

        keras.utils.set_random_seed(seed)
        self._student.set_weights(example_models.resnet20(_MOMENTUM).get_weights())
        for variable, value in zip(self._optimizer.variables, self._initial, strict=True):
            variable.assign(value)
        images, labels = data["x_train"], data["y_train"].ravel().astype(np.int32)
        if self._labelled < 1:
            # The same images for all cases and ways of one seed.
            chosen = np.random.default_rng(seed).permutation(len(images))
            num_labelled = int(self._labelled * len(images))
            if self._model is self._student:
                images, labels = images[chosen[:num_labelled]], labels[chosen[:num_labelled]]
            else:
                labels = labels.copy()
                labels[chosen[num_labelled:]] = -1
        self._model.fit(
            _batches(images, labels, seed), epochs=1, steps_per_epoch=_STEPS.value, verbose=0
        )
        logits = self._student.predict(data["x_test"], batch_size=500, verbose=0)
        return float(np.mean(np.argmax(logits, -1) == data["y_test"].ravel()))


def _batches(images: np.ndarray, labels: np.ndarray, seed: int) -> Any:
    """Batches without end, in random order, each a random view."""
    import tensorflow as tf

    view = CropAndFlip(4)

    def viewed(step: Any, batch: Any) -> Any:
        key = tf.stack([tf.constant(seed, tf.int32), tf.cast(step, tf.int32)])
        return view(tf.cast(batch[0], tf.float32), batch[1], key)

    found = tf.data.Dataset.from_tensor_slices((images, labels))
    found = found.shuffle(len(images), seed=seed).repeat().batch(_BATCH_SIZE, drop_remainder=True)
    return found.enumerate().map(viewed, tf.data.AUTOTUNE).prefetch(4)


def _read(file: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _compare(
    runs: list[dict[str, Any]], case: str, against: str, target: float
) -> dict[str, Any] | None:
    """The paired difference of two cases over the seeds that both have."""
    from scipy import stats

    found = {
        name: {run["seed"]: run["accuracy"] for run in runs if run["case"] == name}
        for name in (case, against)
    }
    seeds = sorted(found[case].keys() & found[against].keys())
    if len(seeds) < 2:
        return None
    gains = np.array([found[case][seed] - found[against][seed] for seed in seeds])
    error = gains.std(ddof=1) / np.sqrt(len(seeds))
    half_width = float(stats.t.ppf(0.975, len(seeds) - 1) * error)
    gain = float(gains.mean())
    is_sure = target < 0 or gain - half_width > 0
    return {
        "case": case,
        "against": against,
        "num_seeds": len(seeds),
        "accuracy": float(np.mean([found[case][seed] for seed in seeds])),
        "gain": gain,
        "low": gain - half_width,
        "high": gain + half_width,
        "target": target,
        "is_met": gain >= target and is_sure,
    }


if __name__ == "__main__":
    reporting.run_app(main)
