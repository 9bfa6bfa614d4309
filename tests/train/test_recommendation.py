import pytest

import tfopt
from tfopt.measure import environment, suitability
from tfopt.train import recommendation


@pytest.mark.parametrize(
    ("capability", "policy"),
    [
        ((6, 1), "float32"),
        ((7, 0), "mixed_float16"),
        ((7, 5), "mixed_float16"),
        ((8, 0), "mixed_bfloat16"),
        ((9, 0), "mixed_bfloat16"),
        (None, "float32"),
    ],
)
def test_gpus(capability, policy):
    advice = recommendation.for_gpu("Some GPU", capability)
    assert (advice.policy, advice.device) == (policy, "Some GPU")
    assert advice.reason.endswith(".")
    if capability:
        assert f"compute capability {capability[0]}.{capability[1]}" in advice.reason


@pytest.mark.parametrize(
    ("flags", "policy", "word"),
    [
        ({"avx2", "avx512f"}, "float32", "slower"),
        ({"avx512_bf16"}, "mixed_bfloat16", "AVX512-BF16"),
        ({"avx512_bf16", "amx_bf16"}, "mixed_bfloat16", "AMX"),
        ({"bf16", "asimd"}, "mixed_bfloat16", "BF16"),
    ],
)
def test_processors(flags, policy, word):
    advice = recommendation.for_cpu("Some CPU", frozenset(flags))
    assert advice.policy == policy
    assert word in advice.reason


def test_this_machine():
    advice = tfopt.recommend_precision()
    if not environment.gpus():
        assert (advice.policy == "float32") == (not suitability.of_this_cpu("bfloat16").suits)
        assert environment.cpu_model() in str(advice)
