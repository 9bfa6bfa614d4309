"""`tfopt compare`: messages, statuses, and regressions that end with 3."""

import json

import pytest

from tfopt import commands


def test_compare_of_nothing(refused):
    assert "results.json" in refused("compare")


def test_compare_of_what_is_not_there(refused):
    assert "nowhere.json" in refused("compare", "nowhere.json")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 99, "rows": []}'])
def test_compare_of_what_is_no_result(content, refused, tmp_path):
    (tmp_path / "other.json").write_text(content)
    assert "other.json" in refused("compare", "other.json")


def write_results(path, cpu="A", speedup=2.0, median_ms=1.0, margin=0.01):
    rows = [
        {
            "model": "m", "variant": variant, "status": "ok", "batch_size": 1, "num_threads": 2,
            "median_ms": median, "median_low_ms": median / (1 + margin),
            "median_high_ms": median * (1 + margin), "speedup": ratio,
            "speedup_low": ratio / (1 + margin), "speedup_high": ratio * (1 + margin),
        }
        for variant, ratio, median in (
            ("float32@tensorflow", 1.0, 2.0), ("float32@litert", speedup, median_ms),
        )
    ]  # fmt: skip
    path.write_text(json.dumps({"format": 2, "environment": {"cpu": cpu}, "rows": rows}))


def test_compare(call, tmp_path):
    write_results(tmp_path / "a.json")
    status, out, err = call("compare", "a.json", "--baseline=float32@litert")
    assert (status, err) == (commands.DONE, "")
    assert out.splitlines()[-2:] == [
        "m      float32@litert              1      1",
        "m      float32@tensorflow          2    0.5",
    ]
    status, out, err = call("compare", "a.json", "--markdown")
    assert out.startswith("| variant |")


def test_compare_writes_for_tensorboard(call, refused, tmp_path):
    write_results(tmp_path / "a.json")
    status, out, err = call("compare", "a.json", "--tensorboard=logs")
    assert status == 0, err
    assert "runs are in logs, for tensorboard --logdir" in out
    assert list((tmp_path / "logs").rglob("events*"))
    assert "exists already" in refused("compare", "a.json", "--tensorboard=logs")


def test_compare_of_two_machines(call, refused, tmp_path):
    write_results(tmp_path / "a.json")
    write_results(tmp_path / "b.json", cpu="B")
    assert "different machines (A; B)" in refused("compare", "a.json", "b.json")
    status, out, _ = call("compare", "a.json", "b.json", "--mixed=machines")
    assert status == commands.DONE
    assert "machine" in out.splitlines()[0]


class TestCompareAgainst:
    def against(self, call, *more):
        return call("compare", "new.json", "--against=old.json", *more)

    def test_regression_ends_with_3(self, call, tmp_path):
        write_results(tmp_path / "old.json")
        write_results(tmp_path / "new.json", speedup=1.8)
        status, out, _ = self.against(call, "--fail_if_slower=0.05")
        assert status == commands.REGRESSION
        assert "float32@litert: It is 0.900 times as fast as before, at most 0.911; 0.95" in out
        # Without being asked to fail, it only shows it.
        assert self.against(call)[0] == commands.DONE

    @pytest.mark.parametrize("speedup", [1.96, 2.0, 3.0])
    def test_what_is_tolerated_is_done(self, speedup, call, tmp_path):
        write_results(tmp_path / "old.json")
        write_results(tmp_path / "new.json", speedup=speedup)
        assert self.against(call, "--fail_if_slower=0.05")[0] == commands.DONE

    def test_what_is_not_proven_is_done(self, call, tmp_path):
        write_results(tmp_path / "old.json", margin=0.2)
        write_results(tmp_path / "new.json", speedup=1.8, margin=0.2)
        status, out, _ = self.against(call, "--fail_if_slower=0.05")
        assert status == commands.DONE
        assert "maybe" in out
        assert "measure longer" in out

    def test_absolute_looks_at_times(self, call, tmp_path):
        write_results(tmp_path / "old.json")
        write_results(tmp_path / "new.json", median_ms=1.5)
        assert self.against(call, "--fail_if_slower=0.05")[0] == commands.DONE
        flags = ("--fail_if_slower=0.05", "--absolute")
        assert self.against(call, *flags)[0] == commands.REGRESSION

    def test_other_machines_are_refused(self, call, tmp_path):
        write_results(tmp_path / "old.json", cpu="B")
        write_results(tmp_path / "new.json")
        status, _, err = self.against(call)
        assert status == commands.WRONG_INPUT
        assert "different machines" in err
        assert self.against(call, "--mixed=machines")[0] == commands.DONE
        # Times of two machines cannot be compared, whoever asks.
        status, _, err = self.against(call, "--mixed=machines", "--absolute")
        assert status == commands.WRONG_INPUT

    @pytest.mark.parametrize("flag", ["--fail_if_slower=0.05", "--absolute"])
    def test_needs_results_to_compare_with(self, flag, refused, tmp_path):
        write_results(tmp_path / "new.json")
        assert "give --against=FILE.json" in refused("compare", "new.json", flag)


def test_compare_with_an_unknown_baseline(call, tmp_path):
    write_results(tmp_path / "a.json")
    status, _, err = call("compare", "a.json", "--baseline=int8@litert")
    assert status == commands.WRONG_INPUT
    assert "there are: float32@tensorflow, float32@litert" in err
