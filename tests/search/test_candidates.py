import pytest

from tfopt import runtimes
from tfopt.errors import InputError
from tfopt.measure import environment, suitability
from tfopt.search.candidates import OWN_RUNTIME, plan
from tfopt.variant import Variant

KINDS = sorted(OWN_RUNTIME)

ABSENT = """
from tfopt.runtimes.base import Runtime, precision

class Absent(Runtime):
    name, packages, library = "absent", (), "json"

    def missing(self):
        return "absent is not installed; pip install absent."

    def load(self, artifact, num_threads):
        raise NotImplementedError

    @precision("int8", kinds=("saved_model", "onnx"))
    def int8(self, conversion):
        pass

RUNTIME = Absent()
"""


@pytest.fixture
def absent(tmp_path, monkeypatch):
    """Adds a runtime that is not installed."""
    (tmp_path / "absent.py").write_text(ABSENT)
    monkeypatch.setattr(runtimes, "__path__", [*runtimes.__path__, str(tmp_path)])
    runtimes.names.cache_clear()
    yield Variant("int8", "absent")
    runtimes.names.cache_clear()
    runtimes.get.cache_clear()


def parse(*texts):
    return tuple(Variant.parse(text) for text in texts)


def unsuited(variant):
    found = runtimes.get(variant.runtime).suitability(variant)
    return None if found is None or found.suits else found.reason


class TestEverything:
    @pytest.mark.parametrize("kind", KINDS)
    def test_that_can_start_from_the_source_is_in_it_once(self, kind, absent):
        found = plan(kind)
        expected = {
            variant
            for variant in runtimes.tried_variants()
            if kind in runtimes.precision_of(variant).kinds
            and (environment.gpus() or not runtimes.get(variant.runtime).has_engines)
        }
        assert len(found.variants) == len(set(found.variants))
        assert set(found.variants) == expected
        assert found.variants == (*found.baselines, *found.candidates, *found.skipped)

    @pytest.mark.parametrize("kind", KINDS)
    def test_is_skipped_exactly_for_a_reason(self, kind, absent):
        found = plan(kind)
        for variant in (*found.candidates, *found.skipped):
            runtime = runtimes.get(variant.runtime)
            reason = runtime.missing() or unsuited(variant)
            assert (variant in found.skipped) == (reason is not None)
            if reason:
                assert found.skipped[variant].lower() == reason.lower()
                assert found.skipped[variant][0].isupper()

    @pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", None])
    def test_bfloat16_is_tried_exactly_where_the_processor_has_it(self, flag, monkeypatch):
        monkeypatch.setattr(environment, "cpu_flags", lambda: frozenset({"avx2", flag} - {None}))
        monkeypatch.setattr(suitability, "tensorflow_gpu", lambda: None)
        found = plan("saved_model")
        half = [v for v in runtimes.tried_variants() if "bfloat16" in str(v)]
        assert set(parse("int8(activations=bfloat16)@openvino")) < set(half)
        for variant in half:
            if runtimes.get(variant.runtime).missing() is None:
                assert (variant in found.candidates) is (flag is not None)
                assert (variant in found.skipped) is (flag is None)
                if flag is None:
                    assert "has no bfloat16 instructions" in found.skipped[variant]

    def test_runtime_that_is_not_installed(self, absent):
        expected = "Absent is not installed; pip install absent."
        assert plan("saved_model").skipped[absent] == expected
        assert plan("onnx").skipped[absent] == expected
        assert absent not in plan("tflite").variants

    @pytest.mark.parametrize("kind", KINDS)
    def test_keeps_the_order_of_the_runtimes(self, kind):
        order = runtimes.tried_variants()
        for part in (plan(kind).baselines, plan(kind).candidates, tuple(plan(kind).skipped)):
            assert list(part) == sorted(part, key=order.index)


class TestBaselines:
    @pytest.mark.parametrize(
        ("kind", "expected"),
        [
            (
                "saved_model",
                parse(
                    "float32@tensorflow",
                    "float32(frozen=True)@tensorflow",
                    "float32(xla=True)@tensorflow",
                ),
            ),
            ("tflite", parse("float32@litert")),
            ("onnx", parse("float32@onnxruntime")),
        ],
    )
    def test_are_the_unchanged_ways_of_the_source_itself(self, kind, expected):
        assert plan(kind).baselines == expected
        assert plan(kind, ["int8@openvino"]).baselines == expected

    def test_unchanged_on_another_runtime_is_a_candidate(self):
        found = plan("saved_model")
        assert set(parse("float32@litert", "float32@onnxruntime")) <= set(found.candidates)

    @pytest.mark.parametrize("kind", KINDS)
    def test_asked_for_are_not_tried_twice(self, kind):
        found = plan(kind, [str(plan(kind).baselines[0])])
        assert found.candidates == ()
        assert found.skipped == {}
        assert plan(kind, ["*"]).baselines == plan(kind).baselines


class TestRequested:
    def test_in_the_order_that_was_asked_for(self):
        texts = ["int8@onnxruntime", "dynamic_range@litert", "float32@litert"]
        assert plan("saved_model", texts).candidates == parse(*texts)
        assert plan("saved_model", texts * 2).candidates == parse(*texts)

    def test_unsuited_ones_are_tried_when_asked_for(self):
        texts = ["int16x8@litert", "float16@onnxruntime"]
        everything = plan("saved_model")
        assert set(parse(*texts)) <= set(everything.skipped)
        asked = plan("saved_model", texts)
        assert asked.candidates == parse(*texts)
        assert asked.skipped == {}
        assert asked.unsuited == {v: everything.skipped[v] for v in asked.candidates}
        assert everything.unsuited == {}

    @pytest.mark.parametrize("kind", KINDS)
    def test_whatever_has_a_reason_of_this_machine_is_tried_when_asked_for(self, kind):
        for variant in plan(kind).skipped:
            runtime = runtimes.get(variant.runtime)
            if runtime.missing() is None and runtime.suitability(variant).works:
                assert plan(kind, [str(variant)]).candidates == (variant,)

    @pytest.mark.parametrize("is_emulated", [True, False])
    def test_bfloat16_is_skipped_where_nothing_computes_it(self, is_emulated, monkeypatch):
        flags = {"sse2", "avx2"} | ({"avx512f"} if is_emulated else set())
        monkeypatch.setattr(environment, "cpu_flags", lambda: frozenset(flags))
        monkeypatch.setattr(suitability, "tensorflow_gpu", lambda: None)
        asked = ["bfloat16@tensorflow"]
        if runtimes.get("openvino").missing() is None:
            asked += ["bfloat16@openvino", "int8(activations=bfloat16)@openvino"]
        found = plan("saved_model", asked)
        assert found.candidates == (parse(*asked) if is_emulated else ())
        assert tuple(found.skipped) == (() if is_emulated else parse(*asked))

    def test_those_that_need_another_source_are_skipped(self):
        found = plan("onnx", ["int8@litert", "int8@onnxruntime"])
        (variant,) = parse("int8@litert")
        assert found.candidates == parse("int8@onnxruntime")
        assert list(found.skipped) == [variant]
        assert "cannot start from" in found.skipped[variant]
        assert "onnx" in found.skipped[variant]
        assert set(plan("tflite", ["*@tensorflow"]).skipped) == {
            v for v in runtimes.tried_variants() if v.runtime == "tensorflow"
        }

    def test_those_that_are_not_installed_are_skipped(self, absent):
        found = plan("saved_model", ["*@absent", "int8@litert"])
        assert found.candidates == parse("int8@litert")
        assert list(found.skipped) == [absent]

    def test_nothing_at_all(self):
        found = plan("saved_model", [])
        assert found.candidates == ()
        assert found.variants == found.baselines

    def test_unknown_ones_are_refused(self):
        with pytest.raises(InputError, match="Unknown precision 'int4'"):
            plan("saved_model", ["int4@litert"])
        with pytest.raises(InputError, match=r"Nothing matches 'int4@\*'"):
            plan("saved_model", ["int4@*"])
