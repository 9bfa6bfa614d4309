from hypothesis import given
from hypothesis import strategies as st

from tfopt.search import finalists


def row(name, speedup, median_ms, status="ok", spread=0.05):
    return {
        "variant": name,
        "status": status,
        "speedup": speedup,
        "speedup_low": speedup * (1 - spread),
        "speedup_high": speedup * (1 + spread),
        "median_ms": median_ms,
    }


def test_those_that_could_be_as_fast_as_the_leader_take_part():
    rows = [row("base", 1.0, 10.0), row("a", 4.0, 2.5), row("b", 3.8, 2.6), row("c", 2.0, 5.0)]
    assert finalists.choose(rows, "base") == ["a", "b", "base"]


def test_wide_intervals_bring_more_in():
    rows = [row("a", 4.0, 2.5), row("b", 3.0, 2.6), row("c", 2.6, 5.0, spread=0.4)]
    assert finalists.choose(rows, "base") == ["a", "c", "b"]


def test_a_baseline_that_became_slow_does_not_decide():
    """The speed-up of `a` was measured while the machine was slower; `b` and `c` are quicker."""
    rows = [row("a", 8.0, 5.0), row("b", 4.0, 2.0), row("c", 3.0, 3.0)]
    assert finalists.choose(rows, "base") == ["a", "b", "c"]


def test_what_failed_or_misses_the_budget_takes_no_part():
    rows = [row("a", 9.0, 1.0, status="over_budget"), row("b", 2.0, 5.0), {"status": "failed"}]
    assert finalists.choose(rows, "base") == ["b"]
    assert finalists.choose(rows[:1], "base") == []


@given(
    st.lists(
        st.tuples(st.floats(0.01, 100), st.floats(0.001, 1000), st.sampled_from(["ok", "slow"])),
        max_size=30,
    )
)
def test_the_leader_comes_first_and_the_number_is_limited(values):
    rows = [row(str(i), *value) for i, value in enumerate(values)]
    inside = [values for values in rows if values["status"] == "ok"]
    chosen = finalists.choose(rows, "none")
    assert len(chosen) == len(set(chosen)) <= finalists.NUM_CLOSE + finalists.NUM_QUICKEST
    assert bool(chosen) == bool(inside)
    if inside:
        assert chosen[0] == max(inside, key=lambda values: values["speedup"])["variant"]
        quickest = min(values["median_ms"] for values in inside)
        assert any(v["median_ms"] == quickest and v["variant"] in chosen for v in inside)
    assert set(chosen) <= {values["variant"] for values in inside}


def rows_of(**speedups):
    return {name: row(name, speedup, 1 / speedup) for name, speedup in speedups.items()}


def test_the_fastest_that_is_proven_faster_comes_first():
    rows = rows_of(a=1.2, base=1.0, b=2.0)
    assert finalists.rank(rows, rows, "base") == ["b", "a", "base"]


def test_the_unchanged_model_comes_before_what_is_not_proven_faster():
    rows = rows_of(slower=0.98, a=1.02, base=1.0, b=1.5)
    assert finalists.rank(rows, rows, "base") == ["b", "base", "a", "slower"]
    del rows["b"]
    assert finalists.rank(rows, rows, "base")[0] == "base"


def test_a_baseline_outside_the_limits_is_not_chosen():
    rows = rows_of(a=1.02, base=1.0)
    assert finalists.rank(["a"], rows, "base") == ["a"]
