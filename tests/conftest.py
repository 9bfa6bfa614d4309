import os
import signal

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


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
