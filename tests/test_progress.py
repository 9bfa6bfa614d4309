import io
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfopt.progress import Progress, duration


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


class Terminal(io.StringIO):
    def isatty(self):
        return True

    @property
    def screen(self):
        """The lines that a terminal shows at the end."""
        lines = self.getvalue().split("\n")
        return [line.rpartition("\r\x1b[K")[2] for line in lines]


class TestBar:
    def test_shows_what_is_done_now_and_the_best_so_far(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "120")
        stream = Terminal()
        progress = Progress(stream=stream)
        progress.say("Reading the model …")
        progress.start(4)
        progress.doing("converting a@litert")
        assert stream.screen[-1] == f"{'░' * 20} 0/4 · converting a@litert · 4 left"
        progress.finish("a@litert: 1 ms", "a@litert, 2.00 ×")
        progress.doing("measuring b@litert")
        *lines, bar = stream.screen
        assert lines[0] == "Reading the model …"
        assert lines[1].startswith("[1/4] a@litert: 1 ms (about")
        assert len(lines) == 2
        assert bar.startswith(f"{'█' * 5}{'░' * 15} 1/4 · measuring b@litert · about 0 s left")
        assert bar.endswith("best so far: a@litert, 2.00 ×")
        progress.close()
        progress.say("Searched.")
        assert stream.screen[2:] == ["Searched.", ""]

    def test_never_wraps(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "40")
        stream = Terminal()
        progress = Progress(stream=stream)
        progress.start(2)
        progress.doing("converting " + "x" * 100)
        assert len(stream.screen[-1]) == 39

    def test_quiet_has_none(self):
        stream = Terminal()
        progress = Progress(True, stream)
        progress.start(2)
        progress.doing("a")
        progress.finish("b")
        progress.close()
        assert stream.getvalue() == ""

    def test_what_was_finished_before_says_nothing_about_time(self):
        stream = io.StringIO()
        progress = Progress(stream=stream)
        progress.start(3)
        progress.finish("a", is_new=False)
        assert stream.getvalue() == "[1/3] a (2 left)\n"
        time.sleep(0.06)
        progress.finish("b")
        assert "about 0 s left" in stream.getvalue()


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
