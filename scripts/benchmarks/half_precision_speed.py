"""What half precision gains in training and inference of a Keras model.

Targets on a CPU with AVX512-BF16 (mixed_bfloat16, batch 64): wrn16_4 1.6 times float32 in inference
and 1.5 times in training, ResNet50 1.5 times in inference. On an H200 (ResNet50, mixed_float16,
batch 128, XLA): training 1.45 times, inference 3 times. Everywhere: layers chosen one by one are
no slower than the policy with its defaults, and watching gradients costs at most 5 %.

One step at a time of each model, in random order in one process: a training step with its
optimizer (stochastic gradient descent with momentum), or an inference. Weights are random, or those
of the file; labels are random. --variants adds converted SavedModels to the inferences.

    python scripts/benchmarks/half_precision_speed.py --model=resnet50 --output=resnet50.json \
        --variants=bfloat16@tensorflow
    python scripts/benchmarks/half_precision_speed.py --model=resnet50 --policy=mixed_float16 \
        --batch_size=128 --jit_compile --calls=10 --nolayers --output=resnet50_gpu.json

It takes 10 minutes on two cores; --nolayers leaves out the choice of layers, most of it.
"""

import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import example_models
import reporting
from absl import flags

import tfopt
from tfopt.measure import latency
from tfopt.train import compiling, copies, layer_times

_MODEL = flags.DEFINE_string("model", "resnet50", "A .keras file, resnet50 or mobilenet_v2.")
_POLICY = flags.DEFINE_enum(
    "policy", "mixed_bfloat16", ["mixed_bfloat16", "mixed_float16"], "Compared with float32."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Examples in a step.", lower_bound=1)
_JIT_COMPILE = flags.DEFINE_bool("jit_compile", False, "Compile steps with XLA.")
_LAYERS = flags.DEFINE_bool("layers", True, "Also choose layers one by one.")
_WHOLE = flags.DEFINE_bool(
    "whole", False, "Also all layers in half precision, softmax and averages included."
)
_STEPS = flags.DEFINE_list("steps", ["inference", "training"], "Which of the two.")
_CALLS = flags.DEFINE_integer(
    "calls", 1, "Steps in one timed call; several on a GPU, which runs behind.", lower_bound=1
)
_VARIANTS = flags.DEFINE_list(
    "variants",
    [],
    "Of the runtime tensorflow, timed in inference too, such as bfloat16@tensorflow.",
)
_MAX_TIMING_S = flags.DEFINE_float("max_timing_s", 60.0, "For each of the two.")
_TARGET_INFERENCE = flags.DEFINE_float("target_inference", None, "Times float32.")
_TARGET_TRAINING = flags.DEFINE_float("target_training", None, "Times float32.")
_OUTPUT = reporting.define_output()

_MAX_COST_OF_WATCH = 1.05


def main(_: list[str]) -> None:
    """Builds, times and prints."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    model = _load()
    images = tf.random.stateless_uniform(
        [_BATCH_SIZE.value, *model.input_shape[1:]], [0, 1], 0.0, 255.0
    )
    labels = tf.random.stateless_uniform(
        [_BATCH_SIZE.value], [0, 2], 0, model.output_shape[-1], tf.int32
    )
    rows = [("step", "model", "times float32", "low", "high", "target")]
    results = []
    for kind in _STEPS.value:
        for found in _measure(kind, model, images, labels):
            results.append(found)
            low, high = (f"{found[name]:.3f}" for name in ("low", "high"))
            rows.append(
                (kind, found["model"], f"{found['speedup']:.3f}", low, high, found["target"])
            )
    print(f"\n{reporting.format_table(rows)}")
    reporting.save(
        _OUTPUT.value,
        {
            "benchmark": "half_precision_speed",
            "model": _MODEL.value,
            "policy": _POLICY.value,
            "batch_size": _BATCH_SIZE.value,
            "jit_compile": _JIT_COMPILE.value,
            "calls": _CALLS.value,
            "tensor_float_32": tf.config.experimental.tensor_float_32_execution_enabled(),
            "is_met": all("MISSED" not in found["target"] for found in results),
            "cases": results,
        },
    )


def _load() -> Any:
    import keras

    if _MODEL.value in example_models.NAMES:
        keras.utils.set_random_seed(0)
        module = getattr(keras.applications, _MODEL.value)
        model = getattr(module, example_models.NAMES[_MODEL.value])(weights=None)
    else:
        model = keras.models.load_model(pathlib.Path(_MODEL.value), compile=False)
    is_softmax = "softmax" in str(getattr(model.layers[-1], "activation", model.layers[-1].name))
    model.compile(
        keras.optimizers.SGD(1e-4, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=not is_softmax),
        jit_compile=_JIT_COMPILE.value,
    )
    return model


def _measure(kind: str, model: Any, images: Any, labels: Any) -> list[dict[str, Any]]:
    """Times all models side by side; one result for each but float32."""
    is_training = kind == "training"
    half = tfopt.set_precision(model, _POLICY.value)
    models = {"float32": tfopt.set_precision(model, "float32"), "policy": half}
    if _LAYERS.value:
        profile = tfopt.profile_precision(
            model,
            images,
            _POLICY.value,
            for_training=is_training,
            batch_size=_BATCH_SIZE.value,
            max_error=float("inf"),
        )
        print(profile, flush=True)
        models["layers"] = tfopt.set_precision(model, profile.policy, profile.keep_float32)
    if _WHOLE.value:
        models["whole"] = copies.copy_with_policies(model, {}, _POLICY.value)
        compiling.compile_like(model, models["whole"])
    if is_training:
        models["policy, watched"] = _watched(tfopt.set_precision(model, _POLICY.value))
    step = _training_step if is_training else _inference
    calls = {name: step(found, images, labels) for name, found in models.items()}
    if not is_training:
        calls |= {name: _variant(model, name, images) for name in _VARIANTS.value}
    timings = layer_times.time_steps(
        calls,
        max_s=_MAX_TIMING_S.value,
        interval_width=0.01,
    )
    results = []
    for name in list(calls)[1:]:
        speedup = latency.speedup(timings["float32"], timings[name])
        results.append(
            {
                "step": kind,
                "model": name,
                "speedup": speedup.estimate,
                "low": speedup.low,
                "high": speedup.high,
                "float32_s": timings["float32"].median_s,
                "steal_share": timings["float32"].steal_share,
                "target": _judge(kind, name, speedup.estimate, timings),
            }
        )
    return results


def _judge(kind: str, name: str, speedup: float, timings: dict[str, latency.Timing]) -> str:
    """The target and whether it is met; variants have that of the policy."""
    if name == "whole":
        return ""
    if name == "policy" or name in _VARIANTS.value:
        target = (_TARGET_TRAINING if kind == "training" else _TARGET_INFERENCE).value
        return "" if target is None else f"{target} {reporting.met(speedup >= target)}"
    over_policy = latency.speedup(timings["policy"], timings[name])
    if name == "layers":
        is_met = over_policy.high >= 1
        return f"no slower than policy ({over_policy.estimate:.3f}) {reporting.met(is_met)}"
    cost = 1 / over_policy.estimate
    is_met = cost <= _MAX_COST_OF_WATCH
    return f"{_MAX_COST_OF_WATCH} of policy ({cost:.3f}) {reporting.met(is_met)}"


def _training_step(model: Any, images: Any, labels: Any) -> Callable[[], Any]:
    model.make_train_function()

    def run() -> None:
        for _ in range(_CALLS.value):
            model.train_function(iter([(images, labels)]))

    return run


def _inference(model: Any, images: Any, _: Any) -> Callable[[], Any]:
    import tensorflow as tf

    infer = tf.function(lambda x: model(x, training=False), jit_compile=_JIT_COMPILE.value)

    def run() -> None:
        for _ in range(_CALLS.value):
            infer(images)

    return run


def _variant(model: Any, name: str, images: Any) -> Callable[[], Any]:
    """The SavedModel that a conversion leaves, on inputs that are where TensorFlow wants them."""
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as work:
        artifact = tfopt.convert(model, name, pathlib.Path(work, "artifact"))
        print(f"{name}: {' '.join(artifact.notes)}", flush=True)
        loaded = tf.saved_model.load(str(artifact.folder / "saved_model"))
    infer = loaded.signatures[artifact.signature.key]
    inputs = {artifact.signature.inputs[0].name: images}

    def run() -> None:
        for _ in range(_CALLS.value):
            infer(**inputs)
        assert loaded  # its variables and functions live as long

    return run


def _watched(model: Any) -> Any:
    watch = tfopt.PrecisionWatch()
    watch.set_model(model)
    watch.on_train_begin()
    return model


if __name__ == "__main__":
    reporting.run_app(main)
