"""Every golden model goes through every runtime and precision.

A pair that cannot work stands in EXEMPTIONS with its cause; an exemption that is no longer needed
fails, and so does a precision that the grid does not reach.
"""

import dataclasses
import os
import re
import time

import numpy as np
import pytest

from tests import goldens
from tfopt import dataset, runtimes, source
from tfopt.errors import ConversionError
from tfopt.measure import diagnosis, environment, latency
from tfopt.search import steps
from tfopt.variant import Variant

BATCH_SIZE = 4
LEFT_OUT = set(filter(None, os.environ.get("TFOPT_TEST_WITHOUT", "").split(",")))
# What needs a GPU is tried where there is one and the libraries are there.
LEFT_OUT |= {r.name for r in runtimes.all_runtimes() if r.has_engines and r.missing() is not None}
TENSORFLOW = tuple(int(part) for part in environment.versions()["tensorflow"].split(".")[:2])
VARIANTS = [variant for variant in runtimes.tried_variants() if variant.runtime not in LEFT_OUT]
GRID = [(golden.name, variant) for golden in goldens.GOLDENS.values() for variant in VARIANTS
        if golden.is_tried_on(variant)]  # fmt: skip

# The error of a precision, as the norm of the difference over the norm of the reference's
# deviation from its mean; wide enough for models of a few neurons with random weights.
TOLERANCE = {
    "float32": 2e-5,
    "float16": 5e-3,
    "bfloat16": 4e-2,
    "dynamic_range": 0.1,
    "int16x8": 0.35,  # like int8 it cuts off what calibration on few examples did not see
    "int8": 0.35,
}


def _tolerance(name: str, variant: Variant) -> float:
    computes_on_gpu = runtimes.get(variant.runtime).has_engines or (
        variant.runtime in ("tensorflow", "onnxruntime") and environment.gpus()
    )
    is_tf32 = variant.precision == "float32" and computes_on_gpu
    found = TOLERANCE["float16" if is_tf32 else variant.precision]  # both have ten bits
    return max(found, goldens.GOLDENS[name].rounding)


# What layers of a variant compute in, where that is not the name of its precision.
DTYPES = {
    ("float32", "tensorflow"): {"float32", "float64"},  # as the model does
    ("float16", "litert"): {"float32"},  # weights are widened at load
    ("float16", "onnxruntime"): {"float16", "float32"},  # the CPU kernels cast
    ("float16", "openvino"): {"float16", "float32"},  # weights are widened at load
    ("dynamic_range", "litert"): {"int8", "float32"},  # small weights stay float32
    ("dynamic_range", "onnxruntime"): {"int8"},
    ("int16x8", "litert"): {"int16"},
    # OpenVINO leaves small products to float32.
    ("int8", "openvino"): {"int8", "uint8", "float32"},
    ("bfloat16", "openvino"): {"bfloat16", "float32"},
}


@dataclasses.dataclass(frozen=True)
class Exemption:
    """A pair that cannot work.

    Attributes:
      cause: of the failure, as a person would say it.
      message: pattern that the conversion's reason matches.
      ends_process: the library ends the whole process here, so that the test must not try.
    """

    cause: str
    message: str
    ends_process: bool = False


EXEMPTIONS: dict[tuple[str, str], Exemption] = {
    **{
        ("lstm", name): Exemption("LiteRT's calibrator crashes on loops.", "models with loops")
        for name in (
            "int8@litert",
            "int8(inputs=int8,outputs=int8)@litert",
            "int16x8@litert",
        )
    },
    **{
        (name, "bfloat16(sensitive_ops=half)@tensorflow"): Exemption(
            "They have no softmax, reduction or normalisation that bfloat16 could take.",
            "No sensitive operation",
        )
        for name in ("dynamic", "integer_input", "lstm", "module")
    },
    ("transformer", "int16x8@litert"): Exemption(
        "SQUARED_DIFFERENCE of LayerNormalization has no int16 kernel.",
        "SquaredDifference",
        ends_process=TENSORFLOW < (2, 20),
    ),
    ("integer_input", "int16x8@litert"): Exemption(
        "The converter wants a range for the integer input.", "Max and min for dynamic tensors"
    ),
    ("integer_input", "int8(inputs=int8,outputs=int8)@litert"): Exemption(
        "Token numbers do not fit into int8.", "Only float32 inputs can become int8"
    ),
    ("masked_attention", "int8@litert"): Exemption(
        "Logits of -inf leave no step of int8 to the others.",
        r"infinite values \(\w+\)",
        ends_process=TENSORFLOW < (2, 20),
    ),
    ("spectrum", "float32@onnxruntime"): Exemption(
        "tf2onnx writes no magnitude of complex numbers whose shape it does not know.",
        "cannot convert this model: .*Abs",
    ),
    ("detector", "float32@litert"): Exemption(
        "LiteRT has another kernel for suppression, as a custom operation.",
        "no kernel for CombinedNonMaxSuppression",
    ),
    ("detector", "float32@openvino"): Exemption(
        "OpenVINO's front end knows other suppressions only.", "OpenVINO cannot convert this model"
    ),
}


@dataclasses.dataclass
class Converted:
    """A golden with everything that was made of it."""

    dataset: dataset.Dataset
    reference: dict[str, np.ndarray]
    outcomes: dict[Variant, object]


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """Converts a golden to every variant once and keeps it."""
    kept: dict[str, Converted] = {}

    def convert(name: str) -> Converted:
        if name not in kept:
            kept[name] = _convert_all(goldens.GOLDENS[name], tmp_path_factory.mktemp(name))
        return kept[name]

    return convert


def _convert_all(golden, folder) -> Converted:
    model = golden.build()
    golden.save(model, str(folder / "model"))
    prepared = source.prepare(folder / "model", folder / "source")
    data = dataset.write(golden.examples(64, 0), prepared.signature, folder / "data")
    outcomes: dict[Variant, object] = {}
    variants = [variant for name, variant in GRID if name == golden.name]
    for variant in sorted(variants, key=lambda variant: len(steps.parents_of(variant))):
        exemption = EXEMPTIONS.get((golden.name, str(variant)))
        if exemption is not None and exemption.ends_process:
            continue
        parents = steps.parents_of(variant)
        try:
            outcomes[variant] = steps.convert(
                prepared,
                variant,
                folder / "artifacts" / variant.slug,
                folder / "artifacts" / parents[-1].slug if parents else None,
                data,
                BATCH_SIZE,
            )
        except ConversionError as error:
            outcomes[variant] = error
    inputs, _, _ = next(data.evaluation.batches(prepared.signature, BATCH_SIZE))
    return Converted(data, _call(model, inputs, prepared.signature.output_names), outcomes)


def _call(model, inputs, names) -> dict[str, np.ndarray]:
    """The live model's own answer."""
    import tensorflow as tf

    values = {name: tf.constant(value) for name, value in inputs.items()}
    given = values if len(values) > 1 else next(iter(values.values()))
    outputs = model(given)
    outputs = outputs if isinstance(outputs, dict) else {names[0]: outputs}
    return {name: np.asarray(value) for name, value in outputs.items()}


def _error(value: np.ndarray, reference: np.ndarray) -> float:
    spread = np.linalg.norm(reference - reference.mean())
    return float(np.linalg.norm(value - reference) / spread)


@pytest.mark.parametrize(("name", "variant"), GRID, ids=str)
def test_variant_agrees_with_live_model(converted, name, variant):
    exemption = EXEMPTIONS.get((name, str(variant)))
    if exemption is not None and exemption.ends_process:
        return  # test_isolation shows that a child's end is a row; nothing to run here
    made = converted(name)
    outcome = made.outcomes[variant]
    if exemption is not None:
        assert isinstance(outcome, ConversionError), f"stale exemption: {exemption.cause}"
        assert re.search(exemption.message, str(outcome))
        return
    if isinstance(outcome, ConversionError):
        raise outcome
    with runtimes.load(outcome, num_threads=None) as session:
        inputs, _, _ = next(made.dataset.evaluation.batches(session.signature, BATCH_SIZE))
        outputs = session.run(inputs)
    assert outputs.keys() == made.reference.keys()
    for output, reference in made.reference.items():
        assert outputs[output].shape == reference.shape
        assert outputs[output].dtype == reference.dtype
        assert _error(outputs[output], reference) < _tolerance(name, variant)


@pytest.mark.parametrize("name", goldens.GOLDENS)
def test_reduced_precision_is_not_float32_in_disguise(converted, name):
    """A quantizer that silently keeps float32 would pass every accuracy test."""
    for variant, outcome in converted(name).outcomes.items():
        if variant.precision not in ("int8", "int16x8") or isinstance(outcome, Exception):
            continue
        with runtimes.load(outcome, num_threads=None) as session:
            inputs, _, _ = next(converted(name).dataset.evaluation.batches(session.signature, 4))
            outputs = session.run(inputs)
        reference = converted(name).reference
        assert any(_error(outputs[key], reference[key]) > 1e-4 for key in reference), str(variant)


@pytest.mark.parametrize("name", goldens.GOLDENS)
def test_batch_sizes_and_repeats_agree(converted, name):
    """A session gives the same answer again, and for other batch sizes where it takes them."""
    made = converted(name)
    for variant, outcome in made.outcomes.items():
        if isinstance(outcome, Exception) or variant.options:
            continue
        with runtimes.load(outcome, num_threads=None) as session:
            inputs, _, _ = next(made.dataset.evaluation.batches(session.signature, BATCH_SIZE))
            first, again = session.run(inputs), session.run(inputs)
            for key in first:
                np.testing.assert_array_equal(first[key], again[key], err_msg=str(variant))
            is_batch_dependent = runtimes.precision_of(variant).is_batch_dependent
            if session.signature.batch_size is not None or is_batch_dependent:
                continue
            single = session.run({key: value[:1] for key, value in inputs.items()})
            for key in first:
                spread = np.abs(first[key]).max()
                np.testing.assert_allclose(
                    single[key], first[key][:1], atol=0.02 * spread, err_msg=str(variant)
                )


@pytest.mark.parametrize("name", goldens.GOLDENS)
def test_what_is_executed_can_be_seen(converted, name):
    made = converted(name)
    for variant, outcome in made.outcomes.items():
        if isinstance(outcome, Exception):
            continue
        batches = dataset.some_batches(made.dataset, outcome.signature, BATCH_SIZE, 2)
        reference = made.outcomes.get(Variant("float32", variant.runtime))
        found = diagnosis.diagnose(outcome, batches, batches, 1, reference)
        assert not any("could not be seen" in text for text in found.sentences), str(variant)
        if ("xla", True) in variant.options:
            assert not found.layers, str(variant)
            continue
        assert all(layer.op for layer in found.layers), str(variant)
        dtypes = {layer.dtype for layer in found.layers}
        wanted = DTYPES.get((variant.precision, variant.runtime), {variant.precision})
        assert dtypes & wanted, f"{variant} computes in {dtypes}"


@pytest.mark.parametrize("runtime", sorted({variant.runtime for variant in VARIANTS}))
def test_runs_on_the_core_that_it_is_told(converted, runtime):
    """OpenVINO, for one, would choose by itself."""
    made = converted("depthwise")
    outcome = made.outcomes[Variant("float32", runtime)]
    batches = dataset.some_batches(made.dataset, outcome.signature, BATCH_SIZE, 2)
    for core in environment.cores():
        with runtimes.load(outcome, None if runtime == "tensorflow" else 1) as session:
            timer = latency.SessionTimer(session, batches)
            timer.block(3, 0.02, [core])
            before = environment.busy_times()
            with environment.only_on([core]):
                end = time.perf_counter() + 0.4
                while time.perf_counter() < end:
                    session.run(batches[0])
            after = environment.busy_times()
        assert after[core] - before[core] >= 0.25 * os.sysconf("SC_CLK_TCK")


def test_grid_reaches_every_precision():
    for runtime in runtimes.all_runtimes():
        if runtime.name in LEFT_OUT:
            continue
        assert runtime.missing() is None, f"{runtime.name} is not installed: {runtime.missing()}"
        for precision in runtime.precisions.values():
            reached = [
                v for v in VARIANTS if (v.precision, v.runtime) == (precision.name, runtime.name)
            ]
            assert reached, f"{precision.name}@{runtime.name} tries nothing"
            assert precision.name in TOLERANCE


def test_exemptions_name_pairs_of_the_grid():
    names = {str(variant): variant for variant in runtimes.tried_variants()}
    for golden, variant in EXEMPTIONS:
        assert golden in goldens.GOLDENS
        assert goldens.GOLDENS[golden].is_tried_on(names[variant])
