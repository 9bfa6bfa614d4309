import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tfopt import variant
from tfopt.errors import InputError
from tfopt.variant import Variant

FORM = re.escape("expected precision(option=value,…)@runtime, for example int8(per_channel=False)@")


def is_word(text):
    """Whether a value can only be text: no Boolean and no number."""
    try:
        number = float(text)
    except ValueError:
        return text not in ("True", "False")
    return number != number


names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
words = st.from_regex(r"[A-Za-z0-9_.+-]{1,8}", fullmatch=True).filter(is_word)
values = st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False), words)
options = st.dictionaries(names, values, max_size=4).map(lambda found: tuple(found.items()))
variants = st.builds(Variant, names, names, options)


class TestVariant:
    @settings(suppress_health_check=[HealthCheck.too_slow])
    @given(variants)
    @example(Variant("int8", "x", (("a", "nan"),)))
    @example(Variant("int8", "x", (("a", 1e16), ("b", -1e-16), ("c", float("inf")))))
    def test_prints_and_parses_back(self, given_variant):
        parsed = Variant.parse(str(given_variant))
        assert parsed == given_variant
        # 1 == True == 1.0, so that equality alone does not tell them apart.
        assert [type(v) for _, v in parsed.options] == [type(v) for _, v in given_variant.options]

    @given(names, names, st.dictionaries(names, values, max_size=4), st.data())
    def test_order_and_blanks_do_not_matter(self, precision, runtime, found, data):
        items = data.draw(st.permutations(list(found.items())))
        blank = data.draw(st.sampled_from(["", " ", "  "]))
        inside = f"{blank},{blank}".join(f"{n}{blank}={blank}{v}" for n, v in items)
        text = f"{blank}{precision}({blank}{inside}{blank})@{runtime}{blank}"
        assert Variant.parse(text) == Variant(precision, runtime, tuple(found.items()))

    @given(st.text(alphabet="ab1_.-+=,()@ *é\n", max_size=20) | st.text(max_size=20))
    def test_any_text_is_a_variant_or_refused_with_the_form(self, text):
        try:
            parsed = Variant.parse(text)
        except InputError as error:
            assert "precision(option=value" in str(error) or "stands twice" in str(error)
        else:
            assert Variant.parse(str(parsed)) == parsed

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "int8",
            "@litert",
            "int8@",
            "int8@litert@x",
            "int8(a=1@litert",
            "int8(a=1)litert",
            "int8(a=(1))@litert",
            "in t8@litert",
            "8int@litert",
            "int8@lite-rt",
            "(a=1)@litert",
        ],
    )
    def test_refuses_other_forms(self, text):
        with pytest.raises(InputError, match=f"Not a variant: {re.escape(repr(text))}; {FORM}"):
            Variant.parse(text)

    @pytest.mark.parametrize("item", ["a", "a=", "=1", "a b=1", "a==1", "a=b c", "1=a"])
    def test_refuses_what_is_no_option_and_names_it(self, item):
        with pytest.raises(InputError, match=f"Not an option: {re.escape(repr(item))} in .*{FORM}"):
            Variant.parse(f"int8({item})@litert")

    def test_refuses_an_option_given_twice(self):
        with pytest.raises(InputError, match=r"Option 'a' stands twice in .* give it once"):
            Variant.parse("int8(a=1,b=2,a=1)@litert")

    def test_names_of_the_design(self):
        found = Variant.parse("int8(outputs=int8, inputs=int8)@litert")
        assert str(found) == "int8(inputs=int8,outputs=int8)@litert"
        assert found.spec == "int8(inputs=int8,outputs=int8)"
        assert Variant.parse("float32(frozen=True)@tensorflow").options == (("frozen", True),)
        assert str(Variant("int8", "litert")) == "int8@litert"
        assert Variant("int8", "litert").spec == "int8"


class TestSlug:
    @given(st.lists(variants, min_size=2, max_size=6, unique_by=str))
    @example([Variant("p", "r", (("a", 1e16),)), Variant("p", "r", (("a", 1e-16),))])
    def test_is_another_for_every_variant(self, found):
        assert len({item.slug for item in found}) == len(found)

    @given(variants)
    def test_is_a_plain_folder_name(self, found):
        assert re.fullmatch(r"[A-Za-z0-9_.@=+-]+", found.slug)
        assert found.slug.startswith(found.precision)
        assert found.slug.endswith(f"@{found.runtime}")

    def test_reads_like_the_name(self):
        slug = Variant.parse("int8(calibration=entropy,per_channel=False)@onnxruntime").slug
        assert slug == "int8-calibration=entropy-per_channel=False@onnxruntime"
        assert Variant.parse("int8@litert").slug == "int8@litert"


class TestSplit:
    @given(st.lists(variants, max_size=5), st.sampled_from([",", ", ", " ,", ",,"]))
    def test_takes_apart_what_was_joined(self, found, comma):
        text = comma.join(map(str, found))
        assert variant.split(text) == [str(item) for item in found]

    @given(st.text(alphabet="ab,() ", max_size=16))
    def test_agrees_with_a_regular_expression(self, text):
        if set(re.sub(r"\([^()]*\)", "", text)) & set("()"):
            with pytest.raises(InputError, match=f"Unbalanced parentheses.*{FORM}"):
                variant.split(text)
        else:
            items = re.findall(r"(?:[^,()]|\([^()]*\))+", text)
            assert variant.split(text) == [item.strip() for item in items if item.strip()]

    def test_keeps_patterns(self):
        text = "*@litert, int8(calibration=entropy,per_channel=False)@onnxruntime,int8@*"
        assert variant.split(text) == [
            "*@litert",
            "int8(calibration=entropy,per_channel=False)@onnxruntime",
            "int8@*",
        ]
