import importlib.metadata
import importlib.util
import inspect
from pathlib import Path

import pytest

from tfopt import runtimes
from tfopt.errors import InputError
from tfopt.runtimes import base
from tfopt.variant import Variant

DECLARED = [
    (runtime, precision)
    for runtime in runtimes.all_runtimes()
    for precision in runtime.precisions.values()
]
IDS = [f"{precision.name}@{runtime.name}" for runtime, precision in DECLARED]


def parse(*texts):
    return [Variant.parse(text) for text in texts]


class TestExpand:
    def test_variants_in_order_without_repeats(self):
        texts = ["int8@litert", "float32@tensorflow", "int8@litert", "int8@onnxruntime"]
        expected = parse("int8@litert", "float32@tensorflow", "int8@onnxruntime")
        assert runtimes.expand(texts) == expected

    def test_runtime_pattern_gives_everything_that_is_tried_on_it(self):
        found = runtimes.expand(["*@litert"])
        assert found == [v for v in runtimes.tried_variants() if v.runtime == "litert"]
        assert set(parse("float32@litert", "int8@litert", "dynamic_range@litert")) < set(found)
        assert Variant.parse("int8(inputs=int8,outputs=int8)@litert") in found

    def test_precision_pattern_gives_it_on_all_runtimes(self):
        found = runtimes.expand(["int8@*"])
        assert {v.precision for v in found} == {"int8"}
        assert {"litert", "onnxruntime", "openvino"} <= {v.runtime for v in found}
        assert found == [v for v in runtimes.tried_variants() if v.precision == "int8"]

    def test_patterns_may_stand_anywhere(self):
        everything = runtimes.tried_variants()
        assert runtimes.expand(["*"]) == runtimes.expand(["*@*"]) == everything
        assert runtimes.expand(["float*@tensor*w"]) == [
            v for v in everything if v.precision.startswith("float") and v.runtime == "tensorflow"
        ]

    def test_pattern_and_variant_share_no_repeat(self):
        found = runtimes.expand(["int8@litert", "*@litert"])
        assert found[0] == Variant.parse("int8@litert")
        assert len(found) == len(set(found)) == len(runtimes.expand(["*@litert"]))

    def test_unknown_runtime_lists_the_runtimes(self):
        with pytest.raises(InputError, match=r"Unknown runtime 'lite'.*litert.*onnxruntime"):
            runtimes.expand(["int8@lite"])

    def test_unknown_precision_lists_the_precisions(self):
        with pytest.raises(InputError, match=r"Unknown precision 'int4'.*float32.*int8"):
            runtimes.expand(["int4@litert"])

    def test_unknown_option_lists_the_options(self):
        with pytest.raises(InputError, match=r"Unknown option 'chanel'.*calibration, per_channel"):
            runtimes.expand(["int8(chanel=True)@onnxruntime"])
        with pytest.raises(InputError, match=r"Unknown option 'a'.*float16@litert has: none"):
            runtimes.expand(["float16(a=1)@litert"])

    @pytest.mark.parametrize("value", ["maximum", "True", "1"])
    def test_unknown_value_lists_the_values(self, value):
        with pytest.raises(InputError, match=r"calibration is one of minmax, percentile, entropy"):
            runtimes.expand([f"int8(calibration={value})@onnxruntime"])

    @pytest.mark.parametrize("value", ["1", "0", "1.0", "true"])
    def test_a_number_is_no_boolean(self, value):
        with pytest.raises(InputError, match="per_channel is one of True, False"):
            runtimes.expand([f"int8(per_channel={value})@onnxruntime"])

    @pytest.mark.parametrize("text", ["int4@*", "*@lite", "x*", "*(xla=True)@tensorflow"])
    def test_pattern_without_a_match_lists_both(self, text):
        with pytest.raises(InputError) as caught:
            runtimes.expand([text])
        message = str(caught.value)
        assert repr(text) in message
        for runtime, precision in DECLARED:
            assert runtime.name in message
            assert precision.name in message

    def test_malformed(self):
        with pytest.raises(InputError, match="Not a variant"):
            runtimes.expand(["int8"])


class TestCanonical:
    def test_drops_options_that_repeat_a_default(self):
        text = "int8(calibration=minmax,per_channel=True)@onnxruntime"
        assert runtimes.expand([text]) == parse("int8@onnxruntime")
        text = "int8(calibration=entropy,per_channel=True)@onnxruntime"
        assert runtimes.expand([text]) == parse("int8(calibration=entropy)@onnxruntime")

    def test_keeps_what_differs(self):
        text = "float32(frozen=False,xla=True)@tensorflow"
        assert runtimes.expand([text]) == parse("float32(xla=True)@tensorflow")


@pytest.mark.parametrize(("runtime", "precision"), DECLARED, ids=IDS)
class TestDeclarations:
    def test_every_option_parses_back(self, runtime, precision):
        assert runtimes.expand([f"{precision.name}@{runtime.name}"])
        for name, declared in precision.options.items():
            if isinstance(declared, base.OneOf):
                values = declared.values
                assert len(set(values)) == len(values) > 1
            else:
                values = (declared.minimum, declared.minimum + 6)
            for value in values:
                variant = Variant(precision.name, runtime.name, ((name, value),))
                assert Variant.parse(str(variant)) == variant
                assert runtimes.precision_of(variant) is precision
                is_default = value == declared.default
                assert runtime.canonical(variant).options == (() if is_default else variant.options)

    def test_every_tried_set_is_declared_and_canonical(self, runtime, precision):
        found = [Variant(precision.name, runtime.name, tuple(t.items())) for t in precision.tried]
        assert len(set(found)) == len(found)
        for variant in found:
            assert Variant.parse(str(variant)) == variant
            assert runtime.canonical(variant) == variant
            assert runtimes.expand([str(variant)]) == [variant]
            assert variant in runtimes.tried_variants()

    def test_parents_lead_to_the_source(self, runtime, precision):
        for options in precision.tried:
            variant, steps = Variant(precision.name, runtime.name, tuple(options.items())), 0
            while variant is not None:
                declared = runtimes.precision_of(variant)
                # What comes after must be able to start from whatever its parent starts from.
                assert set(precision.kinds) <= set(declared.kinds)
                variant, steps = runtimes.get(variant.runtime).parent(variant), steps + 1
                assert steps < 5

    def test_has_a_method_with_a_docstring_and_its_options(self, runtime, precision):
        method = getattr(runtime, precision.method)
        assert method.__doc__
        code = method.__func__.__code__
        named = set(code.co_varnames[2 : code.co_argcount + code.co_kwonlyargcount])
        takes_more = bool(code.co_flags & inspect.CO_VARKEYWORDS)
        assert named < set(precision.options) if takes_more else named == set(precision.options)

    def test_says_in_a_sentence_whether_this_machine_gains(self, runtime, precision):
        if precision.suitability is None:
            assert precision.name not in ("float16", "bfloat16")
            return
        reason = precision.suitability().reason
        assert reason[0].isupper()
        assert reason.endswith(".")


class TestRuntimes:
    def test_one_file_each(self):
        files = Path(runtimes.__file__).parent.glob("*.py")
        expected = {file.stem for file in files} - {"__init__", "base"}
        assert set(runtimes.names()) == expected
        assert [runtime.name for runtime in runtimes.all_runtimes()] == list(runtimes.names())
        assert {"tensorflow", "litert", "onnxruntime", "openvino"} <= expected

    @pytest.mark.parametrize("name", runtimes.names())
    def test_says_what_is_missing(self, name):
        runtime = runtimes.get(name)
        missing = runtime.missing()
        assert isinstance(runtime, base.Runtime)
        assert runtime.precisions
        if missing is None:
            assert importlib.util.find_spec(runtime.library) is not None
        else:
            assert missing.strip() and missing.endswith(".")

    @pytest.mark.parametrize("name", runtimes.names())
    def test_versions_are_those_of_the_distributions(self, name):
        runtime = runtimes.get(name)
        versions = runtime.versions()
        assert set(versions) <= set(runtime.packages)
        for package in runtime.packages:
            try:
                expected = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                assert package not in versions
            else:
                assert versions[package] == expected
        if runtime.missing() is None:
            assert versions

    def test_unknown_name_lists_the_valid_ones(self):
        with pytest.raises(InputError, match=r"Unknown runtime 'base'.*litert.*tensorflow"):
            runtimes.get("base")

    def test_a_new_file_is_picked_up(self, tmp_path, monkeypatch):
        (tmp_path / "dreamt.py").write_text(NEW_RUNTIME)
        monkeypatch.setattr(runtimes, "__path__", [*runtimes.__path__, str(tmp_path)])
        runtimes.names.cache_clear()
        try:
            assert "dreamt" in runtimes.names()
            assert runtimes.expand(["*@dreamt"]) == parse("int8@dreamt", "int8(bits=4)@dreamt")
            assert Variant.parse("int8(bits=4)@dreamt") in runtimes.expand(["int8@*"])
            assert runtimes.get("dreamt").missing() == "it is dreamt."
        finally:
            runtimes.names.cache_clear()
            runtimes.get.cache_clear()


NEW_RUNTIME = """
from tfopt.runtimes.base import Runtime, precision

class Dreamt(Runtime):
    name, packages, library = "dreamt", (), "json"

    def missing(self):
        return "it is dreamt."

    def load(self, artifact, num_threads):
        raise NotImplementedError

    @precision("int8", options={"bits": (8, 4)}, tried=({}, {"bits": 4}))
    def int8(self, conversion, bits):
        pass

RUNTIME = Dreamt()
"""
