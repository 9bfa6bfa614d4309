import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tfopt.errors import InputError
from tfopt.search import ledger
from tfopt.search.ledger import Ledger
from tfopt.variant import Variant

IDENTITY = {"source": "ab", "data": "cd", "variants": ["int8@litert"], "seed": 0, "metric": None}

texts = st.text(max_size=12)
json_values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
fields = st.dictionaries(texts.filter(lambda t: t not in ("step", "variant", "self")), json_values)
steps = st.lists(
    st.tuples(st.sampled_from(["convert", "measure", "final"]), texts, fields), max_size=6
)


def write(folder, records):
    written = Ledger(Path(folder), IDENTITY)
    return [written.add(step, variant, **values) for step, variant, values in records]


class TestRecords:
    @settings(deadline=None)
    @given(steps)
    def test_are_found_again_by_the_next_run(self, records):
        with tempfile.TemporaryDirectory() as folder:
            write(folder, records)
            found = Ledger(Path(folder), IDENTITY)
            last = {(step, variant): values for step, variant, values in records}
            for (step, variant), values in last.items():
                expected = {"step": step, "variant": variant, **values}
                assert found.get(step, variant) == expected
            assert found.get("measure", "never done") is None

    def test_of_a_variant_and_of_the_run(self, tmp_path):
        run = Ledger(tmp_path, IDENTITY)
        variant = Variant.parse("int8(calibration=entropy)@onnxruntime")
        assert run.get("convert", variant) is None
        added = run.add("convert", variant, reason=None, seconds=1.5)
        assert added == {"step": "convert", "variant": str(variant), "reason": None, "seconds": 1.5}
        assert run.get("convert", variant) is added
        assert run.get("convert", str(variant)) is added
        assert run.get("convert") is run.get("measure", variant) is None
        run.add("final", order=["a"])
        assert run.get("final")["order"] == ["a"]

    def test_are_on_disk_at_once(self, tmp_path):
        run = Ledger(tmp_path, IDENTITY)
        for count in range(1, 4):
            run.add("convert", f"v{count}")
            lines = (tmp_path / ledger.FILE_NAME).read_text().splitlines()
            assert json.loads(lines[0])["identity"] == IDENTITY
            assert [json.loads(line)["variant"] for line in lines[1:]] == [
                f"v{index}" for index in range(1, count + 1)
            ]

    def test_folder_is_made(self, tmp_path):
        Ledger(tmp_path / "new" / "folder", IDENTITY).add("final")
        assert Ledger(tmp_path / "new" / "folder", IDENTITY).get("final")


class TestResume:
    @settings(deadline=None, max_examples=80)
    @given(steps, st.data())
    def test_after_a_kill_in_the_middle_of_a_write(self, records, data):
        """Whatever was complete is there, and whatever is added then is, too."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, ledger.FILE_NAME)
            written = write(folder, records)
            content = path.read_bytes()
            length = data.draw(st.integers(0, len(content)))
            path.write_bytes(content[:length])
            ends, end = [], 0
            for line in content.splitlines(keepends=True):
                end += len(line)
                ends.append(end - 1)  # a line that lacks its end alone is complete
            if length < ends[0]:
                with pytest.raises(InputError, match=r"is no ledger of tfopt.*`overwrite=True`"):
                    Ledger(Path(folder), IDENTITY)
                return
            complete = written[: sum(end <= length for end in ends[1:])]
            resumed = Ledger(Path(folder), IDENTITY)
            resumed.add("cold_start", "later", value=1)
            for found in (resumed, Ledger(Path(folder), IDENTITY)):
                last = {(r["step"], r["variant"]): r for r in complete}
                for (step, variant), record in last.items():
                    assert found.get(step, variant) == record
                for record in written[len(complete) :]:
                    key = record["step"], record["variant"]
                    assert found.get(*key) == last.get(key)
                assert found.get("cold_start", "later")["value"] == 1
            assert len(path.read_bytes().splitlines()) == 2 + len(complete)

    def test_damage_elsewhere_is_named(self, tmp_path):
        write(tmp_path, [("convert", "a", {}), ("convert", "b", {})])
        path = tmp_path / ledger.FILE_NAME
        lines = path.read_text().splitlines()
        lines[1] = lines[1][:9]
        path.write_text("\n".join(lines) + "\n")
        with pytest.raises(
            InputError, match=r"ledger.jsonl is damaged in line 2; .*`overwrite=True`"
        ):
            Ledger(tmp_path, IDENTITY)

    @pytest.mark.parametrize("content", ["", "\n", '{"step": "run"}\n', "7\n", "[]\n", "no json\n"])
    def test_of_something_else(self, content, tmp_path):
        (tmp_path / ledger.FILE_NAME).write_text(content)
        with pytest.raises(InputError, match=r"start again with `overwrite=True`"):
            Ledger(tmp_path, IDENTITY)


identities = st.dictionaries(
    st.sampled_from([f"name{index}" for index in range(6)]),
    json_values | st.lists(st.integers(), max_size=3),
    max_size=6,
)


class TestIdentity:
    @given(identities, identities)
    @example({"name1": None}, {})
    def test_every_difference_is_named(self, before, now):
        differing = {name for name in {*before, *now} if before.get(name) != now.get(name)}
        if not differing:
            ledger.check_same(before, now)
            return
        with pytest.raises(InputError) as caught:
            ledger.check_same(before, now)
        message = str(caught.value)
        for name in (f"name{index}" for index in range(6)):
            assert (f"{name} was " in message) == (name in differing)

    def test_says_what_was_and_what_is(self, tmp_path):
        Ledger(tmp_path, IDENTITY)
        changed = {**IDENTITY, "seed": 1, "metric": "top1", "source": "x" * 200}
        with pytest.raises(InputError) as caught:
            Ledger(tmp_path, changed)
        message = str(caught.value)
        assert "seed was 0 and is 1" in message
        assert 'metric was null and is "top1"' in message
        assert 'source was "ab" and is "xxx' in message
        assert "data was" not in message
        assert "use another `output_dir` or `overwrite=True`" in message
        assert len(message) < 400

    def test_is_compared_as_it_is_written(self, tmp_path):
        Ledger(tmp_path, {"variants": ("a", "b"), "budget": 0.1})
        Ledger(tmp_path, {"budget": 0.1, "variants": ["a", "b"]})
