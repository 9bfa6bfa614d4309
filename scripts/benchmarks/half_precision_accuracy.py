"""Whether training in half precision costs accuracy.

Target: of resnet20 on CIFAR-10 (10,000 training images), the 95 % interval of the difference
to float32 in test accuracy, paired by seed, loses at most one point, over as many seeds as make it
narrower than one point. With --bn_momentum=0.999, too.

A seed decides on the initial weights, the order of images and their augmentation; float32 and half
precision get the same. Schedule: 40 epochs of 78 steps of 128 images, stochastic gradient descent
with Nesterov momentum 0.9, learning rate 0.1 that falls to 0 along a cosine, weight decay 5e-4,
random crops (4 pixels) and flips. Accuracy is measured in the precision that was trained in, and,
with statistics of batch normalisation estimated anew from augmented training images, again.

    python scripts/benchmarks/half_precision_accuracy.py --data=cifar10_small.npz \
        --work_dir=runs --output=accuracy.json

The data: an .npz with x_train (10000, 32, 32, 3) uint8, y_train, x_test, y_test. It takes minutes a
seed on a GPU with --jit_compile, and an hour a seed on two cores. Each training is a line in
--work_dir, so that it can be interrupted, and several processes can share the work by
--first_seed and --step_seed.
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
from tfopt.train.loss_scaling import scale_state

_DATA = flags.DEFINE_string("data", None, "Training and test images.", required=True)
_POLICIES = flags.DEFINE_list("policies", ["mixed_bfloat16", "mixed_float16"], "To compare.")
_WORK_DIR = flags.DEFINE_string("work_dir", None, "Folder of finished runs.", required=True)
_EPOCHS = flags.DEFINE_integer("epochs", 40, "Of each training.", lower_bound=1)
_MAX_SEEDS = flags.DEFINE_integer("max_seeds", 40, "At most.", lower_bound=2)
_FIRST_SEED = flags.DEFINE_integer("first_seed", 0, "Of this process.")
_STEP_SEED = flags.DEFINE_integer("step_seed", 1, "Between seeds of this process.", lower_bound=1)
_BN_MOMENTUM = flags.DEFINE_float("bn_momentum", 0.99, "Of batch normalisation.")
_JIT_COMPILE = flags.DEFINE_bool("jit_compile", False, "Compile steps with XLA.")
_OUTPUT = reporting.define_output()

_BATCH_SIZE = 128
_MIN_SEEDS = 5
_MAX_LOSS = 0.01
_MAX_WIDTH = 0.01
_NUM_FOR_STATISTICS = 2048


def main(_: list[str]) -> None:
    """Trains until the intervals are narrow."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    file = pathlib.Path(_WORK_DIR.value) / f"runs_{_EPOCHS.value}_{_BN_MOMENTUM.value}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with np.load(_DATA.value) as archive:
        data = {name: archive[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    policies = ["float32", *_POLICIES.value]
    trainers: dict[str, _Trainer] = {}
    for seed in range(_FIRST_SEED.value, _MAX_SEEDS.value, _STEP_SEED.value):
        if _is_narrow(file):
            break
        for policy in policies:
            if any(run["policy"] == policy and run["seed"] == seed for run in _runs(file)):
                continue
            if policy not in trainers:
                trainers[policy] = _Trainer(policy, len(data["x_train"]))
            run = {"policy": policy, "seed": seed, **trainers[policy].train(data, seed)}
            with file.open("a") as lines:
                lines.write(json.dumps(run) + "\n")
            print(run, flush=True)
    rows = [("policy", "accuracy as", "seeds", "float32", "difference", "low", "high", "target")]
    results = []
    for policy in _POLICIES.value:
        for name in ("accuracy", "reestimated"):
            found = _difference(file, policy, name)
            if found is None:
                continue
            num_seeds, accuracy, difference, half_width = found
            low, high = difference - half_width, difference + half_width
            is_met = low >= -_MAX_LOSS and 2 * half_width <= _MAX_WIDTH
            results.append({
                "policy": policy, "of": name, "num_seeds": num_seeds, "float32": accuracy,
                "difference": difference, "low": low, "high": high, "is_met": is_met,
            })  # fmt: skip
            shown = (f"{value:.4f}" for value in (accuracy, difference, low, high))
            rows.append((policy, name, num_seeds, *shown, reporting.met(is_met)))
    print(f"\n{reporting.format_table(rows)}")
    reporting.save(
        _OUTPUT.value,
        {
            "benchmark": "half_precision_accuracy",
            "bn_momentum": _BN_MOMENTUM.value,
            "epochs": _EPOCHS.value,
            "jit_compile": _JIT_COMPILE.value,
            "is_met": bool(results) and all(item["is_met"] for item in results),
            "cases": results,
            "runs": _runs(file),
        },
    )


class _Trainer:
    """A model of one precision that is trained again and again, compiled once."""

    def __init__(self, policy: str, num_images: int):
        import keras

        self._num_steps = num_images // _BATCH_SIZE
        model = example_models.resnet20(_BN_MOMENTUM.value)
        model.compile(
            keras.optimizers.SGD(
                keras.optimizers.schedules.CosineDecay(0.1, _EPOCHS.value * self._num_steps),
                momentum=0.9, nesterov=True, weight_decay=5e-4,
            ),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"], jit_compile=_JIT_COMPILE.value,
            steps_per_execution=self._num_steps,
        )  # fmt: skip
        self._model = tfopt.set_precision(model, policy)
        optimizer = self._model.optimizer
        self._state = [*optimizer.variables, *scale_state(optimizer)]
        self._initial = [np.array(value) for value in self._state]

    def train(self, data: dict[str, np.ndarray], seed: int) -> dict[str, float]:
        """Returns test accuracies."""
        import keras

        keras.utils.set_random_seed(seed)
        model, rng = self._model, np.random.default_rng(seed)
        model.set_weights(example_models.resnet20(_BN_MOMENTUM.value).get_weights())
        for variable, value in zip(self._state, self._initial, strict=True):
            variable.assign(value)
        num_images = self._num_steps * _BATCH_SIZE
        for _ in range(_EPOCHS.value):
            order = rng.permutation(len(data["x_train"]))[:num_images]
            images = _augmented(data["x_train"][order], rng)
            model.fit(
                images, data["y_train"][order],
                batch_size=_BATCH_SIZE, shuffle=False, verbose=0,
            )  # fmt: skip
        accuracy = self._accuracy(data)
        images = _augmented(data["x_train"][:_NUM_FOR_STATISTICS], rng).astype(np.float32)
        tfopt.reestimate_batchnorm(model, images, batch_size=512)
        return {"accuracy": accuracy, "reestimated": self._accuracy(data)}

    def _accuracy(self, data: dict[str, np.ndarray]) -> float:
        logits = self._model.predict(data["x_test"], batch_size=500, verbose=0)
        return float(np.mean(np.argmax(logits, -1) == data["y_test"].ravel()))


def _augmented(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each image cut out at random from one with a margin of 4 zeros, half of them mirrored."""
    count, size = len(images), images.shape[1]
    wide = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    rows = rng.integers(0, 9, (count, 1)) + np.arange(size)
    columns = rng.integers(0, 9, (count, 1)) + np.arange(size)
    is_mirrored = rng.random(count) < 0.5
    columns[is_mirrored] = columns[is_mirrored, ::-1]
    return wide[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _runs(file: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _difference(
    file: pathlib.Path, policy: str, name: str
) -> tuple[int, float, float, float] | None:
    """Seeds, mean of float32, mean difference to it and half the width of its 95 % interval."""
    from scipy import stats

    by_policy: dict[str, dict[int, float]] = {}
    for run in _runs(file):
        by_policy.setdefault(run["policy"], {})[run["seed"]] = run[name]
    float32, half = by_policy.get("float32", {}), by_policy.get(policy, {})
    seeds = sorted(float32.keys() & half.keys())
    if len(seeds) < 2:
        return None
    differences = np.array([half[seed] - float32[seed] for seed in seeds])
    error = differences.std(ddof=1) / np.sqrt(len(seeds))
    half_width = stats.t.ppf(0.975, len(seeds) - 1) * error
    mean = float(np.mean([float32[seed] for seed in seeds]))
    return len(seeds), mean, float(differences.mean()), float(half_width)


def _is_narrow(file: pathlib.Path) -> bool:
    found = [_difference(file, policy, "accuracy") for policy in _POLICIES.value]
    return all(
        item is not None and item[0] >= _MIN_SEEDS and 2 * item[3] < _MAX_WIDTH for item in found
    )


if __name__ == "__main__":
    reporting.run_app(main)
