import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfopt.errors import ConversionError, InputError
from tfopt.runtimes.base import Conversion
from tfopt.signature import Signature, TensorSpec
from tfopt.trt import shapes
from tfopt.trt.profiles import Profile, ShapeRange
from tfopt.trt.spec import EngineOptions

IMAGE = Signature("serving_default", (TensorSpec("image", (None, 8, 8, 3), "float32"),), ())
TOKENS = Signature(
    "serving_default",
    (TensorSpec("mask", (None, None), "bool"), TensorSpec("tokens", (None, None), "int32")),
    (),
)

sizes = st.lists(st.integers(1, 50), min_size=1, max_size=4)


@st.composite
def ranges(draw):
    lows = draw(sizes)
    steps = [draw(st.tuples(st.integers(0, 9), st.integers(0, 9))) for _ in lows]
    best = [low + a for low, (a, _) in zip(lows, steps, strict=True)]
    high = [b + c for b, (_, c) in zip(best, steps, strict=True)]
    return ShapeRange(tuple(lows), tuple(best), tuple(high))


profiles = st.dictionaries(
    st.text("abc_/", min_size=1, max_size=5), ranges(), min_size=1, max_size=3
).map(Profile)


def zeros(**shapes):
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


@given(profiles)
def test_what_is_spelled_parses_back(profile):
    ends = [profile.spell(end) for end in ("minimum", "optimum", "maximum")]
    assert Profile.parse(*ends) == profile
    assert Profile.from_json(profile.to_json()) == profile


@given(ranges())
def test_a_range_accepts_exactly_what_lies_between(shapes):
    def is_between(shape):
        return all(
            low <= size <= high
            for low, size, high in zip(shapes.minimum, shape, shapes.maximum, strict=True)
        )

    for shape in (shapes.minimum, shapes.optimum, shapes.maximum):
        assert shapes.accepts(shape)
        for index, change in itertools.product(range(len(shape)), (-1, 1)):
            other = list(shape)
            other[index] += change
            assert shapes.accepts(tuple(other)) == is_between(other)
    assert not shapes.accepts((*shapes.minimum, 1))


@pytest.mark.parametrize("text", ["", "image", "image:", "image:1x", ":1x2", "image:ax2", "x:-1"])
def test_malformed_shapes_are_refused(text):
    with pytest.raises(InputError, match=r"Not a shape.*expected input:AxBxC"):
        Profile.parse(text, "image:1x2", "image:1x2")


def test_the_three_name_the_same_inputs():
    with pytest.raises(InputError, match="give each input in all three"):
        Profile.parse("a:1", "a:1,b:1", "a:1,b:1")
    with pytest.raises(InputError, match="Input a stands twice"):
        Profile.parse("a:1,a:2", "a:1", "a:1")


@pytest.mark.parametrize(
    "ends", [("a:2", "a:1", "a:3"), ("a:1", "a:4", "a:3"), ("a:1", "a:1x2", "a:1"), ("a:0",) * 3]
)
def test_ranges_that_are_none_are_refused(ends):
    with pytest.raises(InputError, match="Not a range of shapes"):
        Profile.parse(*ends)


def test_fixed_needs_a_signature_that_is_free_in_the_batch_only():
    fixed = Profile.fixed(IMAGE, 4)
    assert fixed.inputs["image"] == ShapeRange((4, 8, 8, 3), (4, 8, 8, 3), (4, 8, 8, 3))
    assert fixed.is_fixed
    assert fixed.batch_size == 4
    assert Profile.fixed(TOKENS, 4) is None


def test_shapes_of_data():
    batches = [zeros(mask=(2, n), tokens=(2, n)) for n in (7, 3, 3, 12)]
    profile = Profile.of_data(TOKENS, batches, 2, 32)
    assert profile.inputs["tokens"] == ShapeRange((1, 3), (2, 3), (32, 12))
    assert profile.inputs["mask"] == profile.inputs["tokens"]
    of_images = Profile.of_data(IMAGE, [], 64, 32)
    assert of_images.inputs["image"] == ShapeRange((1, 8, 8, 3), (64, 8, 8, 3), (64, 8, 8, 3))
    with pytest.raises(ConversionError, match="free dimensions and there are no examples"):
        Profile.of_data(TOKENS, [], 2, 32)


def test_shapes_of_unknown_rank():
    signature = Signature("serving_default", (TensorSpec("x", None, "float32"),), ())
    scalar = Profile.of_data(signature, [zeros(x=())], 2, 32)
    assert scalar.inputs["x"] == ShapeRange((), (), ())
    with pytest.raises(ConversionError, match="examples of different ranks"):
        Profile.of_data(signature, [zeros(x=(1,)), zeros(x=(1, 2))], 2, 32)


def test_a_profile_of_another_model_is_refused():
    with pytest.raises(InputError, match="The profile is of picture; the model's inputs are image"):
        Profile.parse(*["picture:1x8x8x3"] * 3).check(IMAGE)
    with pytest.raises(InputError, match=r"maximum of image is 9x8x9x3; the model takes image"):
        Profile.parse("image:1x8x8x3", "image:1x8x8x3", "image:9x8x9x3").check(IMAGE)
    Profile.parse("image:1x8x8x3", "image:2x8x8x3", "image:9x8x8x3").check(IMAGE)


def test_inputs_outside_are_named():
    profile = Profile.parse("image:1x8x8x3", "image:2x8x8x3", "image:4x8x8x3")
    assert profile.outside(zeros(image=(4, 8, 8, 3))) is None
    reason = profile.outside(zeros(image=(5, 8, 8, 3)))
    assert reason.startswith("Input image is 5x8x8x3 and the engine was built for 1x8x8x3 to 4x8")


class TestChoose:
    def conversion(self, signature, profile=None, lengths=()):
        class Source:
            pass

        source = Source()
        source.signature = signature

        def batches():
            return iter([zeros(**dict.fromkeys(signature.input_names, (2, n))) for n in lengths])

        return Conversion(
            source, None, None, 2, None, [], signature,
            engine=EngineOptions(profile), shapes=batches if lengths else None,
        )  # fmt: skip

    def test_static_is_one_shape_where_that_can_be(self):
        conversion = self.conversion(IMAGE)
        assert shapes.choose(conversion, "static") == Profile.fixed(IMAGE, 2)
        assert not conversion.notes

    def test_static_of_free_lengths_is_a_range_and_says_so(self):
        conversion = self.conversion(TOKENS, lengths=(3, 5))
        assert shapes.choose(conversion, "static").inputs["mask"].maximum == (32, 5)
        assert "free dimensions besides the batch" in conversion.notes[0]

    def test_dynamic_goes_up_to_batches_of_32(self):
        assert shapes.choose(self.conversion(IMAGE), "dynamic").inputs["image"].maximum[0] == 32

    def test_what_is_given_wins(self):
        given = Profile.parse("image:1x8x8x3", "image:2x8x8x3", "image:4x8x8x3")
        assert shapes.choose(self.conversion(IMAGE, given), "static") == given

    def test_a_given_profile_that_excludes_the_data_is_refused(self):
        given = Profile.parse(*["mask:2x4,tokens:2x4"] * 3)
        with pytest.raises(InputError, match=r"excludes the data .*: Input mask is 2x5"):
            shapes.choose(self.conversion(TOKENS, given, lengths=(4, 5)), "static")
