import io
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfopt.search.progress import Progress, duration


class TestProgress:
    def test_counts_variants(self):
        stream = io.StringIO()
        progress = Progress(stream=stream)
        progress.say("Reading the model …")
        progress.start(3)
        for name in "abc":
            progress.finish(f"{name}@litert: 1 ms")
        first, *lines = stream.getvalue().splitlines()
        assert first == "Reading the model …"
        assert [line.split(" (")[0] for line in lines] == [
            f"[{index}/3] {name}@litert: 1 ms" for index, name in enumerate("abc", 1)
        ]
        assert all(re.search(r"\(about \d+ s left\)$", line) for line in lines[:2])
        assert lines[2].endswith("(done)")

    def test_estimate_grows_with_what_is_left(self):
        stream = io.StringIO()
        progress = Progress(stream=stream)
        progress.start(101)
        time.sleep(0.05)
        progress.finish("one")
        left = int(re.search(r"about (\d+) s left", stream.getvalue())[1])
        assert left >= 5  # a hundred times at least 0.05 s

    def test_starts_anew(self):
        stream = io.StringIO()
        progress = Progress(stream=stream)
        progress.start(2)
        progress.finish("a")
        progress.start(1)
        progress.finish("b")
        assert stream.getvalue().splitlines()[-1] == "[1/1] b (done)"

    def test_quiet(self, capsys):
        stream = io.StringIO()
        progress = Progress(True, stream)
        progress.start(1)
        progress.say("a")
        progress.finish("b")
        assert stream.getvalue() == ""
        assert capsys.readouterr() == ("", "")

    def test_leaves_the_output_to_results(self, capsys):
        Progress().say("a line")
        captured = capsys.readouterr()
        assert (captured.out, captured.err) == ("", "a line\n")


class TestDuration:
    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(0, "0 s"), (40, "40 s"), (89, "89 s"), (720, "12 min"), (5399, "90 min"),
         (12600, "3.5 h"), (86400, "24.0 h")],
    )  # fmt: skip
    def test_table(self, seconds, text):
        assert duration(seconds) == text

    @given(st.floats(0, 1e7))
    def test_is_near_the_truth(self, seconds):
        number, unit = duration(seconds).split()
        size = {"s": 1, "min": 60, "h": 3600}[unit]
        step = 0.1 if unit == "h" else 1
        assert abs(float(number) * size - seconds) <= step / 2 * size * 1.0001
        assert len(duration(seconds)) <= 8
