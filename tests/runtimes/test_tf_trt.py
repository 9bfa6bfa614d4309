"""What of TF-TRT can be seen without a GPU; test_conformance tries the rest where there is one."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from tests import goldens
from tfopt import api, commands, dataset, runtimes, source
from tfopt.artifact import Artifact
from tfopt.commands import convert_trt
from tfopt.errors import ConversionError, InputError
from tfopt.graph import FrozenGraph
from tfopt.measure import environment
from tfopt.runtimes import tf_trt
from tfopt.search import candidates, steps
from tfopt.signature import Signature, TensorSpec
from tfopt.trt import libraries, saved_model
from tfopt.trt.profiles import Profile
from tfopt.trt.spec import EngineOptions
from tfopt.variant import Variant

RUNTIME = runtimes.get("tf_trt")
TENSORFLOW = environment.versions()["tensorflow"]
IS_LATE = tuple(int(part) for part in TENSORFLOW.split(".")[:2]) > (2, 17)
without_gpu = pytest.mark.skipif(bool(environment.gpus()), reason="there is a GPU")
SIGNATURE = Signature("serving_default", (TensorSpec("image", (None, 4, 4, 3), "float32"),), ())


def new_artifact(folder, variant):
    folder.mkdir(parents=True, exist_ok=True)
    artifact = Artifact(folder, Variant.parse(variant), None, "0" * 64, SIGNATURE, 1, 1, {})
    artifact.save()
    return artifact


@without_gpu
class TestWithoutGpu:
    def test_the_sentence_says_what_is_missing_and_what_helps(self):
        reason = RUNTIME.missing()
        if IS_LATE:
            assert reason.startswith(f"TensorFlow {TENSORFLOW} is built without TensorRT")
            assert "pip install 'tensorflow[and-cuda]==2.17.1'" in reason
        else:
            assert reason.startswith("it needs an NVIDIA GPU, and nvidia-smi finds none")

    def test_runtimes_say_it(self, capsys):
        assert commands.main(["runtimes"]) == 0
        assert f"tf_trt: not available, {RUNTIME.missing()}" in capsys.readouterr().out

    @pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
    def test_conversions_are_refused(self, tmp_path, precision):
        with pytest.raises(InputError, match="cannot be made here"):
            api.convert(tmp_path, f"{precision}@tf_trt", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_the_command_refuses(self, tmp_path, capsys):
        out = tmp_path / "out"
        assert commands.main(["convert_trt", f"--model={tmp_path}", f"--output_dir={out}"]) == 2
        assert RUNTIME.missing() in capsys.readouterr().err

    def test_artifacts_from_elsewhere_are_refused(self, tmp_path):
        artifact = new_artifact(tmp_path / "artifact", "float16@tf_trt")
        with pytest.raises(InputError, match="needs tf_trt: "):
            runtimes.load(artifact)
        with pytest.raises(InputError, match="cannot be built here: "):
            api.rebuild(artifact.folder, tmp_path / "new")

    def test_a_search_leaves_it_out_unless_asked(self):
        plan = candidates.plan("saved_model")
        assert "tf_trt" not in {variant.runtime for variant in plan.variants}
        asked = candidates.plan("saved_model", ["float16@tf_trt"])
        reason = asked.skipped[Variant.parse("float16@tf_trt")]
        assert reason[0].isupper()
        assert reason[1:] == RUNTIME.missing()[1:]


class TestLibrary:
    """The sentences on a machine with a GPU, by what TensorFlow and the loader say."""

    @pytest.fixture(autouse=True)
    def with_tensorrt(self, monkeypatch):
        import tensorflow as tf

        monkeypatch.setattr(tf.sysconfig, "get_build_info", lambda: {"is_tensorrt_build": True})
        monkeypatch.setattr(tf_trt, "_linked", lambda: (8, 6, 1))

    def found(self, monkeypatch, version, reason=""):
        monkeypatch.setattr(tf_trt, "_loaded", lambda: libraries.Library(version, reason))
        return tf_trt._library_missing()

    def test_a_missing_library_is_named(self, monkeypatch):
        reason = self.found(monkeypatch, None, "libcublas.so.12: cannot open shared object file")
        assert "looks for TensorRT 8.6.1" in reason
        assert "libcublas.so.12: cannot open" in reason
        assert "pip install tensorrt-libs==8.6.1" in reason

    @pytest.fixture(autouse=True)
    def with_plugins(self, monkeypatch):
        monkeypatch.setattr(libraries, "why_not", lambda name: "")

    def test_a_missing_library_of_plugins_is_named(self, monkeypatch):
        monkeypatch.setattr(libraries, "why_not", lambda name: f"{name}: cannot open")
        reason = self.found(monkeypatch, (8, 6, 1))
        assert "(libnvinfer_plugin.so.8.6.1: cannot open)" in reason
        assert "ln -s libnvinfer_plugin.so.8 libnvinfer_plugin.so.8.6.1" in reason

    def test_what_plugins_need_besides_is_found_by_tensorflow(self, monkeypatch):
        monkeypatch.setattr(libraries, "why_not", lambda name: "libcudnn.so.8: cannot open")
        assert self.found(monkeypatch, (8, 6, 1)) is None

    def test_another_version_is_named(self, monkeypatch):
        reason = self.found(monkeypatch, (10, 0, 1))
        assert "linked against TensorRT 8.6.1 and finds 10.0.1" in reason

    def test_a_patch_is_passed_over(self, monkeypatch):
        assert self.found(monkeypatch, (8, 6, 0)) is None

    def test_a_build_without_it_is_named(self, monkeypatch):
        import tensorflow as tf

        monkeypatch.setattr(tf.sysconfig, "get_build_info", dict)
        assert "is built without TensorRT" in tf_trt._library_missing()


@pytest.mark.skipif(IS_LATE, reason="this TensorFlow has no TF-TRT")
def test_what_tensorflow_is_linked_against():
    assert tf_trt._linked() == (8, 6, 1)


class TestOptions:
    def test_names_parse_back(self):
        text = "int8(max_cached_engines=4,min_segment_size=10,workspace_mib=512)@tf_trt"
        assert [str(variant) for variant in runtimes.expand([text])] == [text]
        assert str(runtimes.expand(["float16(min_segment_size=3)@tf_trt"])[0]) == "float16@tf_trt"

    @pytest.mark.parametrize(
        ("option", "expected"),
        [
            ("min_segment_size=0", "min_segment_size is a whole number of at least 1"),
            ("workspace_mib=1.5", "workspace_mib is a whole number of at least 1"),
            ("max_cached_engines=True", "max_cached_engines is a whole number"),
            ("strategy=range", r"strategy is one of Range\+Optimal, Range, Optimal"),
            ("shapes=free", "shapes is one of static, dynamic"),
            ("tf32=False", "Unknown option 'tf32'"),
        ],
    )
    def test_wrong_values_say_what_is_right(self, option, expected):
        with pytest.raises(InputError, match=expected):
            runtimes.expand([f"float16({option})@tf_trt"])

    def test_strategies_are_those_of_tensorflow(self):
        if IS_LATE:
            pytest.skip("this TensorFlow has no TF-TRT")
        # Importing the converter without the library would end this process: read it.
        import tensorflow as tf

        path = os.path.join(  # noqa: PTH118
            os.path.dirname(tf.__file__), "python/compiler/tensorrt/trt_convert.py"  # noqa: PTH120
        )  # fmt: skip
        with open(path) as file:  # noqa: PTH123
            text = file.read()
        for strategy in saved_model.STRATEGIES:
            assert f'= "{strategy}"' in text
        for argument in (
            "input_saved_model_dir", "input_saved_model_signature_key", "use_dynamic_shape",
            "dynamic_shape_profile_strategy", "precision_mode", "minimum_segment_size",
            "maximum_cached_engines", "use_calibration", "max_workspace_size_bytes",
        ):  # fmt: skip
            assert f"\n               {argument}=" in text
        assert "def _check_trt_version_compatibility():" in text

    def test_flags_of_the_launcher_are_the_options(self, monkeypatch, tmp_path):
        declared = RUNTIME.precisions["float32"].options
        assert set(convert_trt.OPTIONS) == set(declared)
        seen = []
        monkeypatch.setattr(api, "convert", lambda *args, **kwargs: seen.append(args) or quit_())
        out = tmp_path / "out"

        def quit_():
            raise KeyError("enough")

        with pytest.raises(KeyError, match="enough"):
            commands.main(
                ["convert_trt", "--model=m", f"--output_dir={out}", "--precision=float32",
                 "--notf32", "--shapes=dynamic", "--strategy=Optimal", "--workspace_mib=7"]
            )  # fmt: skip
        variant = runtimes.get("tf_trt").canonical(Variant.parse(seen[0][1]))
        assert str(variant) == (
            "float32(shapes=dynamic,strategy=Optimal,tf32=False,workspace_mib=7)@tf_trt"
        )

    def test_layers_in_float32_are_refused(self, tmp_path):
        made = conversion(tmp_path, engine=EngineOptions(float32_layers=("conv",)))
        with pytest.raises(InputError, match="TF-TRT cannot keep single layers in float32"):
            RUNTIME.convert(Variant.parse("float16@tf_trt"), made)

    def test_engine_options_are_for_engines(self, tmp_path):
        with pytest.raises(InputError, match="has no TensorRT engines"):
            api.convert(tmp_path, "float32@litert", tmp_path / "out", engine=EngineOptions())
        artifact = new_artifact(tmp_path / "artifact", "float32@litert")
        with pytest.raises(InputError, match="runs on any machine as it is"):
            api.rebuild(artifact.folder, tmp_path / "new")

    @pytest.mark.parametrize("given", [["min"], ["min", "max"]])
    def test_the_three_shapes_come_together(self, given, capsys, tmp_path):
        flags = [f"--{end}_shapes=image:1x2" for end in given]
        out = f"--output_dir={tmp_path / 'out'}"
        status = commands.main(["convert", "--model=m", "--variant=int8@tf_trt", out, *flags])
        assert status == 2
        assert "--opt_shapes" in capsys.readouterr().err


def conversion(tmp_path, name="conv", num_examples=64, num_calibration=64, engine=None):
    """A `Conversion` of a golden."""
    golden = goldens.GOLDENS[name]
    goldens.export(golden, tmp_path / "model")
    prepared = source.prepare(tmp_path / "model", tmp_path / "source")
    data = dataset.write(
        golden.examples(num_examples, 0), prepared.signature, tmp_path / "data",
        num_calibration=num_calibration,
    )  # fmt: skip
    from tfopt.runtimes.base import Conversion

    (tmp_path / "out").mkdir()
    return Conversion(
        prepared, tmp_path / "out", None, 4,
        dataset.calibration_batches(data, prepared.signature, 4), [], prepared.signature,
        data.num_calibration, engine or EngineOptions(),
    )  # fmt: skip


class TestCalibration:
    def test_few_examples_are_refused(self, tmp_path):
        made = conversion(tmp_path, num_calibration=5)
        with pytest.raises(ConversionError, match="calibrated on 5 examples and needs at least 8"):
            RUNTIME.convert(Variant.parse("int8@tf_trt"), made)

    def test_none_are_refused(self, tmp_path):
        made = dataclasses.replace(conversion(tmp_path), calibration=None)
        with pytest.raises(ConversionError, match="none were set aside; give more `data`"):
            RUNTIME.convert(Variant.parse("int8@tf_trt"), made)

    def of_lengths(self, tmp_path, lengths, batch_size=16):
        """A conversion whose calibration examples have these lengths."""
        from tfopt.runtimes.base import Conversion

        signature = Signature("s", (TensorSpec("x", (None, None), "float32"),), ())
        rows = [{"x": np.zeros(n, np.float32)} for n in lengths]
        rows = [row for row in rows for _ in range(2)]  # half of them are for evaluation
        data = dataset.write(rows, signature, tmp_path, num_calibration=len(lengths))

        class Source:
            pass

        origin = Source()
        origin.signature = signature
        return Conversion(
            origin, None, None, batch_size,
            dataset.calibration_batches(data, signature, batch_size), [], signature,
            data.num_calibration,
            count_shapes=lambda: dataset.count_calibration_shapes(data, signature),
        )  # fmt: skip

    def test_batches_have_the_most_frequent_shape(self, tmp_path):
        """By examples: of the other shape there are as many batches."""
        made = self.of_lengths(tmp_path, [3, 5, 3, 5, 3] + [7] * 30, batch_size=4)
        found = list(tf_trt._of_one_shape(made)())
        assert {batch["x"].shape for batch in found} == {(4, 7)}
        (note,) = made.notes
        counts = made.count_shapes()
        assert note.startswith(f"Calibrated on {counts[(7,),]} of {made.num_calibration} examples")

    def test_nothing_is_said_where_all_have_one_shape(self, tmp_path):
        made = self.of_lengths(tmp_path, [5] * 40)
        assert {batch["x"].shape for batch in tf_trt._of_one_shape(made)()} == {(16, 5)}
        assert not made.notes

    def test_examples_that_only_fill_a_batch_do_not_count(self, tmp_path):
        made = self.of_lengths(tmp_path, range(1, 31))
        with pytest.raises(ConversionError, match=r"that were set aside at most [1-3] have"):
            tf_trt._of_one_shape(made)

    @pytest.mark.parametrize("is_quantized", [True, False])
    def test_ranges_that_training_left_are_found(self, tmp_path, is_quantized):
        import tensorflow as tf

        class Module(tf.Module):
            @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32, name="x")])
            def __call__(self, x):
                if is_quantized:
                    x = tf.quantization.fake_quant_with_min_max_vars(x, -1.0, 1.0)
                return {"y": tf.matmul(x, tf.ones([4, 4]))}

        module = Module()
        tf.saved_model.save(module, str(tmp_path), signatures={"serving_default": module.__call__})
        graph = FrozenGraph.from_saved_model(tmp_path)
        assert saved_model.holds_ranges(graph) == is_quantized

    def test_ranges_are_known_and_stay_when_shapes_are_folded(self, tmp_path):
        """`quantize_and_dequantize_v2` makes an operation that TF-TRT does not know."""
        import tensorflow as tf

        kernel = tf.constant(np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32))

        def emulated(x):
            return tf.quantization.quantize_and_dequantize_v2(x, -1.0, 1.0, range_given=True)

        class Module(tf.Module):
            @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32, name="x")])
            def __call__(self, x):
                return {"y": tf.matmul(emulated(x), emulated(kernel))}

        module = Module()
        tf.saved_model.save(module, str(tmp_path), signatures={"serving_default": module.__call__})
        graph = FrozenGraph.from_saved_model(tmp_path)
        assert not saved_model.holds_ranges(graph)
        known = saved_model.with_known_ranges(graph)
        assert saved_model.holds_ranges(known)

        def num_ranges(graph):
            return sum(node.op == saved_model.EXPLICIT for node in graph.graph_def.node)

        assert num_ranges(known) == 2
        assert num_ranges(known.with_batch_size(3)) == 1  # that of the weights is computed
        fixed = known.with_batch_size(3, keeps_ranges=True)
        assert num_ranges(fixed) == 2
        x = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
        fixed.save(tmp_path / "fixed")
        found = tf.saved_model.load(str(tmp_path / "fixed")).signatures["serving_default"](
            x=tf.constant(x)
        )

        def rounded(values):
            return np.clip(np.rint(values * 127), -128, 127) / 127

        expected = rounded(x) @ rounded(kernel.numpy())
        np.testing.assert_allclose(found["y"], expected, atol=2e-2)


class TestInputs:
    def test_each_shape_once_the_best_first(self):
        profile = Profile.parse("image:1x4x4x3", "image:8x4x4x3", "image:8x4x4x3")
        found = list(saved_model._inputs(SIGNATURE, profile))
        assert [batch["image"].shape[0] for batch in found] == [8, 1]
        assert all(batch["image"].dtype == np.float32 for batch in found)


class TestReasons:
    # Lines as TensorFlow 2.17.1 and TensorRT 8.6 write them.
    FAILED = (
        "W tensorflow/compiler/tf2tensorrt/kernels/trt_engine_op.cc:1122] TF-TRT Warning: Engine "
        "creation for PartitionedCall/TRTEngineOp_000_000 failed. The native segment will be used "
        "instead. Reason: INTERNAL: Failed to build TensorRT engine"
    )

    def result(self, num_segments, reasons=None):
        from tfopt.trt.converted import Converted, Segment

        segments = tuple(Segment(f"s{n}", 3, 0, 0) for n in range(num_segments))
        return saved_model.Result(Converted(segments, ()), reasons or {}, ())

    def test_a_failed_engine_says_why(self):
        text = saved_model._why_nothing(self.result(1), [self.FAILED], 3)
        assert text == "TF-TRT built no engine: INTERNAL: Failed to build TensorRT engine."

    def test_nothing_found_says_which_operations(self):
        reasons = {"Const": ["x"], "Igamma": ["Op type Igamma is not supported"]}
        text = saved_model._why_nothing(self.result(0, reasons), [], 5)
        assert text == (
            "TF-TRT found no part of the graph with at least 5 operations that TensorRT takes "
            "(Igamma: Op type Igamma is not supported)."
        )


class TestMemory:
    """What is done when the GPU's memory runs out while engines are built."""

    GIB = 1 << 30

    def convert(self, monkeypatch, tmp_path, fits_bytes, given_bytes):
        from tfopt.trt.converted import Converted, Segment

        tried = []

        def attempt(graph, folder, profile, options, calibration):
            tried.append(options.workspace_bytes)
            fits = options.workspace_bytes is not None and options.workspace_bytes <= fits_bytes
            folder.mkdir()
            segments = (Segment("a", 3, int(fits), 1), Segment("b", 3, 1, 1))
            lines = [] if fits else [f"{TestReasons.FAILED}: out of memory"]
            return saved_model.Result(Converted(segments, ()), {}, ()), lines, None

        monkeypatch.setattr(saved_model, "_try", attempt)
        options = saved_model.TfTrtOptions("FP16", workspace_bytes=given_bytes)
        result = saved_model.convert(None, tmp_path / "out", None, options, None)
        return tried, result.notes

    def test_smaller_workspaces_are_tried_and_said(self, monkeypatch, tmp_path):
        tried, notes = self.convert(monkeypatch, tmp_path, self.GIB, None)
        assert tried == [None, 4 * self.GIB, self.GIB]
        assert notes == (
            "The GPU's memory ran out while engines were built, so that their workspace is "
            "1,073,741,824 bytes at most.",
        )

    @pytest.mark.parametrize("given", [None, 2 << 20])
    def test_what_does_not_fit_at_all_stays_in_tensorflow(self, monkeypatch, tmp_path, given):
        tried, notes = self.convert(monkeypatch, tmp_path, 0, given)
        assert len(tried) == (4 if given is None else 1)
        assert any("could not become an engine and stayed in TensorFlow" in n for n in notes)

    def fail(self, monkeypatch, tmp_path, lines, failure):
        from tfopt.trt.converted import Converted

        tried = []

        def attempt(graph, folder, profile, options, calibration):
            tried.append(options.workspace_bytes)
            return saved_model.Result(Converted((), ()), {}, ()), lines, failure

        monkeypatch.setattr(saved_model, "_try", attempt)
        options = saved_model.TfTrtOptions("INT8")
        with pytest.raises(ConversionError) as raised:
            saved_model.convert(None, tmp_path / "out", None, options, list)
        return tried, str(raised.value)

    def test_a_calibration_that_runs_out_tries_smaller_ones_and_says_it(
        self, monkeypatch, tmp_path
    ):
        tried, text = self.fail(monkeypatch, tmp_path, [], "Calibration failed: out of memory")
        assert tried == [None, *saved_model.SMALLER_WORKSPACES_BYTES]
        assert "memory ran out while engines were built, also with a workspace of 268,435" in text
        assert text.endswith("(Calibration failed: out of memory)")

    def test_what_is_no_lack_of_memory_is_not_tried_again(self, monkeypatch, tmp_path):
        harmless = [
            "Skipping tactic 3 due to insufficient memory on requested size",
            "Allocator (GPU_0_bfc) ran out of memory trying to allocate 2.19GiB. The caller "
            "indicates that this is not a failure, but this may mean that there could be gains.",
        ]
        tried, text = self.fail(monkeypatch, tmp_path, harmless, "Failed to feed calibration")
        assert tried == [None]
        assert text == "TF-TRT failed: Failed to feed calibration"

    def test_nothing_is_said_where_it_fits(self, monkeypatch, tmp_path):
        assert self.convert(monkeypatch, tmp_path, self.GIB, self.GIB) == ([self.GIB], ())


class TestRanges:
    """What is done when TF-TRT calibrates nothing, which it tells its log only."""

    def convert(self, monkeypatch, tmp_path, has_ranges, calibration):
        from tfopt.trt.converted import Converted, Segment

        segments = tuple(
            Segment(name, 3, num_engines, 1, found)
            for name, num_engines, found in zip("abc", (1, 1, 0), (*has_ranges, False), strict=True)
        )
        result = saved_model.Result(Converted(segments, ()), {}, ())
        monkeypatch.setattr(saved_model, "_try", lambda *_: (result, [], None))
        options = saved_model.TfTrtOptions("INT8")
        return saved_model.convert(None, tmp_path / "out", None, options, calibration).notes

    def test_without_any_nothing_would_be_int8(self, monkeypatch, tmp_path):
        with pytest.raises(ConversionError, match="collected no ranges while it calibrated"):
            self.convert(monkeypatch, tmp_path, (False, False), list)

    def test_an_engine_without_is_named(self, monkeypatch, tmp_path):
        notes = self.convert(monkeypatch, tmp_path, (True, False), list)
        assert notes == (
            "b has no ranges from calibration and is not int8; the examples may not reach it.",
        )

    def test_nothing_is_said_where_all_have_them_or_none_were_wanted(self, monkeypatch, tmp_path):
        assert self.convert(monkeypatch, tmp_path, (True, True), list) == ()
        assert self.convert(monkeypatch, tmp_path, (False, False), None) == ()


def test_int8_engines_are_not_called_float16(monkeypatch, tmp_path):
    """Of Q/DQ in the graph TF-TRT makes int8 engines, whatever it is asked for."""
    from tfopt.trt.converted import Converted, Segment

    def attempt(*_):
        return (
            saved_model.Result(Converted((Segment("a", 3, 1, 1, mode=mode),), ()), {}, ()),
            [],
            None,
        )

    monkeypatch.setattr(saved_model, "_try", attempt)
    options = saved_model.TfTrtOptions("FP16")
    mode = "FP16"
    assert saved_model.convert(None, tmp_path / "out", None, options, None).notes == ()
    mode = "INT8"
    with pytest.raises(ConversionError, match=r"made INT8 of what was to be FP16: .*int8@tf_trt"):
        saved_model.convert(None, tmp_path / "out", None, options, None)


class TestShapesOfEngines:
    """Which shapes a session takes; TF-TRT computes others in TensorFlow, without a word."""

    PROFILE = Profile.parse("image:2x4x4x3", "image:8x6x4x3", "image:8x9x4x3")

    def refusal(self, shape, is_exact=False, strategy=None):
        session = tf_trt.TfTrtSession.__new__(tf_trt.TfTrtSession)
        session._profile, session._is_exact, session._strategy = self.PROFILE, is_exact, strategy
        try:
            session._check_shapes({"image": np.zeros(shape)})
        except InputError as error:
            return str(error)
        return None

    def test_ranges_take_what_lies_between(self):
        assert self.refusal((3, 5, 4, 3)) is None
        assert "the engine was built for" in self.refusal((9, 5, 4, 3))

    def test_single_shapes_take_their_own(self):
        assert self.refusal((8, 6, 4, 3), is_exact=True) is None
        assert "No engine was built for these shapes" in self.refusal((7, 6, 4, 3), is_exact=True)

    def test_one_profile_a_shape_takes_smaller_batches(self):
        strategy = "ImplicitBatchModeCompatible"
        assert self.refusal((3, 6, 4, 3), strategy=strategy) is None
        reason = self.refusal((3, 5, 4, 3), strategy=strategy)
        assert reason.endswith("image:8x9x4x3, each with smaller batches.")


@pytest.mark.parametrize("is_file", [True, False])
def test_standard_error_is_kept_and_handed_on(tmp_path, is_file):
    code = """
import os
from tfopt.logs import copied_stderr
os.write(2, b"earlier\\n")
try:
    with copied_stderr() as lines:
        os.write(2, b"from a library\\n")
        raise ValueError
except ValueError:
    pass
os.write(2, b"later\\n")
print(lines)
"""
    log = tmp_path / "log"
    with log.open("ab") as file:
        ended = subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, text=True,
            stderr=file if is_file else subprocess.PIPE,
        )  # fmt: skip
    assert ended.stdout == "['from a library']\n"
    text = log.read_text() if is_file else ended.stderr
    assert text == "earlier\nfrom a library\nlater\n"


@without_gpu
def test_steps_fail_with_a_sentence(tmp_path):
    golden = goldens.GOLDENS["conv"]
    goldens.export(golden, tmp_path / "model")
    prepared = source.prepare(tmp_path / "model", tmp_path / "source")
    if IS_LATE:
        pytest.skip("this TensorFlow has no TF-TRT")
    variant = Variant.parse("float16@tf_trt")
    with pytest.raises(ConversionError, match="There is no NVIDIA GPU here"):
        steps.convert(prepared, variant, tmp_path / "out", None, None, 4)
