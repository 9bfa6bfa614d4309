import os
import pathlib
import signal

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# Shells without job control start commands in the background with SIGINT ignored, which children
# inherit; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Files that take minutes, the longest first: begun last, they would run alone at the end.
LONG_FILES = (
    "test_notebooks.py", "test_fine_tune.py", "test_distill.py", "test_optimize.py",
    "test_students.py", "test_conformance.py", "test_model_and_data.py", "test_reestimation.py",
    "test_profile.py", "test_watch.py",
)  # fmt: skip


# TensorFlow's rewrite to bfloat16 and OpenVINO's kernels want instructions that not every
# processor has; what tfopt says there is tested apart.
BFLOAT16_FLAGS = ("avx512_bf16", "avx_ne_convert", "amx_bf16")
OF_PROCESSORS_WITH_BFLOAT16 = ("tests/test_half_graph.py", "tests/runtimes/test_conformance.py")


def has_bfloat16():
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in text for flag in BFLOAT16_FLAGS)


def pytest_collection_modifyitems(items):
    if not has_bfloat16():
        skip = pytest.mark.skip(reason="this processor has no bfloat16 instructions")
        for item in items:
            is_half = "bfloat16" in item.nodeid or "sensitive_operations_may_be" in item.name
            if is_half and item.nodeid.startswith(OF_PROCESSORS_WITH_BFLOAT16):
                item.add_marker(skip)
    order = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
