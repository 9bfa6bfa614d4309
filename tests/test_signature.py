import json

from hypothesis import given
from hypothesis import strategies as st

from tfopt.signature import Signature, TensorSpec

dimensions = st.none() | st.integers(0, 9)
shapes = st.none() | st.lists(dimensions, max_size=4).map(tuple)
dtypes = st.sampled_from(["float32", "int64", "bool", "string", "uint8", "bfloat16"])
specs = st.builds(TensorSpec, st.text(min_size=1, max_size=8), shapes, dtypes)
tensors = st.lists(specs, max_size=3).map(tuple)
signatures = st.builds(Signature, st.text(max_size=8), tensors, tensors)


def signature_of(*shapes):
    inputs = tuple(TensorSpec(f"x{i}", shape, "float32") for i, shape in enumerate(shapes))
    return Signature("serving_default", inputs, ())


@given(signatures)
def test_json_round_trip(signature):
    assert Signature.from_json(json.loads(json.dumps(signature.to_json()))) == signature


class TestBatchSize:
    def test_of_free_and_fixed_inputs(self):
        assert signature_of((None, 3)).batch_size is None
        assert signature_of((4, 3)).batch_size == 4
        assert signature_of((4, 3), (4,)).batch_size == 4
        # One free first dimension: the other's is no batch.
        assert signature_of((None, 3), (10, 3)).batch_size is None

    def test_of_inputs_without_a_batch(self):
        assert signature_of(()).batch_size is None
        assert signature_of(None).batch_size is None
        assert signature_of((), (2, 3)).batch_size == 2


class TestWithBatchSize:
    @given(signatures, st.integers(1, 9))
    def test_fixes_free_first_dimensions_and_nothing_else(self, signature, batch_size):
        fixed = signature.with_batch_size(batch_size)
        assert fixed.key == signature.key
        pairs = [(signature.inputs, fixed.inputs), (signature.outputs, fixed.outputs)]
        for before, after in pairs:
            assert len(before) == len(after)
            for old, new in zip(before, after, strict=True):
                assert (new.name, new.dtype) == (old.name, old.dtype)
                if not old.shape:
                    assert new.shape == old.shape
                else:
                    assert new.shape[1:] == old.shape[1:]
                    assert new.shape[0] == (batch_size if old.shape[0] is None else old.shape[0])

    @given(signatures, st.integers(1, 9), st.integers(1, 9))
    def test_is_done_once(self, signature, first, second):
        fixed = signature.with_batch_size(first)
        assert fixed.with_batch_size(second) == fixed

    def test_makes_the_batch_size(self):
        assert signature_of((None, 3), (None, None)).with_batch_size(7).batch_size == 7


def test_names_and_text():
    inputs = (TensorSpec("image", (None, 28, 28), "float32"), TensorSpec("k", (), "int64"))
    outputs = (TensorSpec("text", None, "string"),)
    signature = Signature("serve", inputs, outputs)
    assert signature.input_names == ("image", "k")
    assert signature.output_names == ("text",)
    assert (
        str(signature) == "serve: image float32 (?, 28, 28), k int64 () -> text string unknown rank"
    )
