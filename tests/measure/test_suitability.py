import pytest

from tfopt.measure import environment, suitability


@pytest.mark.parametrize(
    ("dtype", "capability", "suits", "words"),
    [
        ("float16", (6, 1), False, "no Tensor Cores (compute capability 6.1, they came with 7.0)"),
        ("float16", (7, 0), True, "compute capability 7.0"),
        ("bfloat16", (6, 1), False, "they came with 8.0"),
        ("bfloat16", (7, 5), False, "no Tensor Cores for bfloat16 (compute capability 7.5"),
        ("bfloat16", (8, 0), True, "multiply bfloat16"),
        ("bfloat16", (10, 0), True, "compute capability 10.0"),
        ("float16", None, False, "does not tell"),
    ],
)
def test_gpus(dtype, capability, suits, words):
    found = suitability.gpu(dtype, capability)
    assert found.suits == suits
    assert words in found.reason
    assert found.reason.endswith(".")


@pytest.mark.parametrize(
    ("dtype", "flags", "suits", "words"),
    [
        ("bfloat16", {"avx2", "avx512f"}, False, "no bfloat16 instructions (AMX or AVX512-BF16)"),
        ("bfloat16", {"avx512_bf16"}, True, "(AVX512-BF16)"),
        ("bfloat16", {"avx512_bf16", "amx_bf16"}, True, "(AMX)"),
        ("bfloat16", {"bf16", "asimd"}, True, "(BF16)"),
        ("float16", {"avx512_bf16", "f16c"}, False, "no float16 instructions"),
        ("float16", {"amx_fp16"}, True, "(AMX-FP16)"),
    ],
)
def test_processors(dtype, flags, suits, words):
    found = suitability.cpu(dtype, frozenset(flags))
    assert found.suits == suits
    assert words in found.reason
    assert found.reason.endswith(".")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_this_processor(dtype):
    assert suitability.of_this_cpu(dtype) == suitability.cpu(dtype, environment.cpu_flags())
