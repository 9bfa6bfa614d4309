import csv
import json
import math
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfopt.compare import report
from tfopt.compare.comparison import COLUMNS, Comparison
from tfopt.compare.text import size
from tfopt.errors import InputError

DESIGN = [
    "model", "variant", "parent", "batch_size", "num_threads", "status", "chosen", "median_ms",
    "p90_ms", "p99_ms", "device_ms", "speedup", "speedup_low", "speedup_high", "verdict",
    "cold_start_ms", "throughput_per_s", "size_bytes", "compressed_bytes", "peak_memory_bytes",
    "gpu_memory_bytes", "accuracy", "accuracy_drop", "accuracy_drop_high", "agreement",
    "max_abs_error", "reason",
]  # fmt: skip

MEASURED = {
    "model": "digits",
    "variant": "float32(xla=True)@tensorflow",
    "parent": "source",
    "batch_size": 1,
    "num_threads": 2,
    "status": "ok",
    "chosen": False,
    "median_ms": 0.5,
    "p90_ms": 0.625,
    "p99_ms": 0.75,
    "device_ms": 0.125,
    "speedup": 1.0,
    "speedup_low": 0.98,
    "speedup_high": 1.02,
    "verdict": "no_difference",
    "cold_start_ms": 812.25,
    "throughput_per_s": 2000.0,
    "size_bytes": 317_000,
    "compressed_bytes": 290_000,
    "peak_memory_bytes": 512_000_000,
    "gpu_memory_bytes": 256_000_000,
    "accuracy": 0.9833,
    "accuracy_drop": 0.0,
    "accuracy_drop_high": 0.0037,
    "agreement": 1.0,
    "max_abs_error": 0.0,
    "reason": "",
}
CHOSEN = {
    **MEASURED,
    "variant": "int8@litert",
    "parent": "source",
    "chosen": True,
    "median_ms": 0.0625,
    "speedup": 8.0,
    "speedup_low": 7.75,
    "speedup_high": 8.25,
    "verdict": "faster",
    "size_bytes": 81_234,
    "accuracy": 0.98,
    "accuracy_drop": 0.0033,
    "accuracy_drop_high": 0.0081,
    "reason": "1 of 9 layers stayed float32.",
}
FAILED = {
    "model": "digits",
    "variant": "int8@openvino",
    "batch_size": 1,
    "num_threads": 2,
    "status": "failed",
    "chosen": False,
    "median_ms": None,
    "speedup": math.nan,
    "accuracy_drop_high": math.inf,
    "reason": 'NNCF says: "a < b & c" <script>alert(1)</script>',
}
DETAILS = {
    "model": "digits",
    "summary": "int8@litert is the fastest.",
    "environment": {"cpu": "A CPU", "num_cores": 2, "versions": {"tensorflow": "2.21"}},
    "budget": {"max_accuracy_drop": 0.01, "max_latency_ms": None},
}
ONE = Comparison((MEASURED, CHOSEN, FAILED), DETAILS)

NUMBERS = [name for name in COLUMNS if isinstance(MEASURED[name], float)]
figures = st.none() | st.floats() | st.integers(-(2**53), 2**53)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=12)
rows = st.builds(
    lambda found, variant, status, reason: {
        **found, "model": "m", "variant": variant, "status": status, "reason": reason
    },
    st.dictionaries(st.sampled_from(NUMBERS), figures),
    texts,
    st.sampled_from(["ok", "failed", "skipped", "over_budget"]),
    st.none() | texts,
)  # fmt: skip


def is_missing(value):
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def cells_of(folder):
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        head, *lines = csv.reader(file)
    return head, [dict(zip(head, line, strict=True)) for line in lines]


class TestTable:
    def test_has_the_columns_of_the_design(self):
        assert list(COLUMNS) == DESIGN
        assert list(ONE.table.columns) == DESIGN
        assert list(Comparison(()).table.columns) == DESIGN
        assert len(Comparison(()).table) == 0

    def test_holds_the_rows(self):
        table = ONE.table
        assert table.variant.tolist() == [row["variant"] for row in ONE.rows]
        assert table.status.tolist() == ["ok", "ok", "failed"]
        assert table.median_ms.tolist()[:2] == [0.5, 0.0625]
        assert table.set_index("variant").loc["int8@litert", "speedup_high"] == 8.25
        assert table.chosen.tolist() == [False, True, False]

    def test_missing_figures_are_nan_and_not_0(self):
        failed = ONE.table.iloc[2]
        for name in NUMBERS:
            if name != "accuracy_drop_high":
                assert pd.isna(failed[name]), name
        assert ONE.table.median_ms.isna().tolist() == [False, False, True]
        assert (ONE.table[["median_ms", "accuracy", "size_bytes"]].fillna(-1).iloc[2] == -1).all()


class TestFiles:
    def test_csv_has_the_columns_and_empty_cells(self, tmp_path):
        ONE.save(tmp_path)
        head, lines = cells_of(tmp_path)
        assert head == DESIGN
        assert [line["variant"] for line in lines] == [row["variant"] for row in ONE.rows]
        assert lines[1]["median_ms"] == "0.0625"
        assert lines[0]["accuracy_drop"] == "0.0"  # measured
        assert lines[0]["reason"] == ""
        filled = {name for name, value in lines[2].items() if value}
        assert filled == {
            "model", "variant", "batch_size", "num_threads", "status", "chosen", "reason",
        }  # fmt: skip
        assert lines[2]["reason"] == FAILED["reason"]

    @settings(deadline=None, max_examples=50)
    @given(st.lists(rows, max_size=4))
    def test_nothing_that_was_not_measured_becomes_a_number(self, given_rows):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            Comparison(tuple(given_rows)).save(folder)
            _, lines = cells_of(folder)
            opened = Comparison.from_files([folder]).rows
            read = pd.read_csv(folder / "results.csv")
        assert len(lines) == len(opened) == len(read) == len(given_rows)
        for index, (row, line, back) in enumerate(zip(given_rows, lines, opened, strict=True)):
            assert line["variant"] == back["variant"] == row["variant"]
            assert line["reason"] == (row["reason"] or "")
            for column in NUMBERS:
                if is_missing(row.get(column)):
                    assert line[column] == ""
                    assert back.get(column) is None
                    assert pd.isna(read[column].iloc[index])
                else:
                    assert float(line[column]) == float(back[column]) == float(row[column])

    def test_json_round_trip(self, tmp_path):
        ONE.save(tmp_path)
        for path in (tmp_path, tmp_path / "results.json", str(tmp_path)):
            opened = Comparison.from_files([path])
            assert opened.details == DETAILS
            assert opened.rows[:2] == ONE.rows[:2]
            assert opened.rows[2] == {**FAILED, "speedup": None, "accuracy_drop_high": None}
            assert opened.folder == tmp_path
            assert opened.summary == "int8@litert is the fastest."
        again = tmp_path / "again"
        again.mkdir()
        opened.save(again)
        for name in ("results.csv", "results.json", "report.html"):
            assert (again / name).read_bytes() == (tmp_path / name).read_bytes()

    def test_several_files_make_one_table(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            rows = tuple({**row, "model": name} for row in ONE.rows)
            Comparison(rows, DETAILS).save(tmp_path / name)
        both = Comparison.from_files([tmp_path / "a", tmp_path / "b" / "results.json"])
        assert both.table.model.tolist() == ["a"] * 3 + ["b"] * 3
        assert list(both.table.columns) == [*DESIGN, "file", "machine", "baseline"]
        assert both.table.machine.unique().tolist() == ["A CPU, 2 cores"]
        assert both.table.file.tolist()[::3] == [
            str(tmp_path / "a"), str(tmp_path / "b" / "results.json"),
        ]  # fmt: skip
        both.save(tmp_path)
        merged = Comparison.from_files([tmp_path])
        assert merged.table.equals(both.table)
        assert "int8@litert" in merged.to_text()

    def test_results_from_before_a_column_came_lack_its_figures(self, tmp_path):
        new = ("device_ms", "gpu_memory_bytes")
        rows = [
            {key: value for key, value in row.items() if key not in new} for row in ONE.rows[:2]
        ]
        Comparison(tuple(rows), DETAILS).save_json(tmp_path / "results.json")
        table = Comparison.from_files([tmp_path]).table
        assert list(table.columns) == DESIGN
        assert table[list(new)].isna().all(axis=None)
        assert table.median_ms.tolist() == [0.5, 0.0625]
        ONE.save_json(tmp_path / "now.json")
        both = Comparison.from_files([tmp_path, tmp_path / "now.json"]).table
        assert both.device_ms.tolist()[2:4] == [0.125, 0.125]
        assert both.device_ms.isna().tolist()[:2] == [True, True]

    def test_merged_results_keep_their_origin(self, tmp_path):
        for name in ("a", "b", "c"):
            (tmp_path / name).mkdir()
            ONE.save(tmp_path / name)
        Comparison.from_files([tmp_path / "a", tmp_path / "b"]).save(tmp_path)
        rows = Comparison.from_files([tmp_path, tmp_path / "c"]).rows
        files = [str(tmp_path / name) for name in "abc"]
        assert [row["file"] for row in rows] == [name for name in files for _ in range(3)]

    @pytest.mark.parametrize(
        ("what", "row", "details", "named"),
        [
            ("machines", {}, {"environment": {"cpu": "B"}}, r"A CPU, 2 cores; B"),
            ("machines", {}, {"environment": {"cpu": "A CPU", "num_cores": 4}}, "4 cores"),
            ("batch_sizes", {"batch_size": 8}, {}, "1 with 2 threads; 8 with 2 threads"),
            ("batch_sizes", {"num_threads": 1}, {}, "1 with 1 threads; 1 with 2 threads"),
            ("baselines", {}, {"baseline": "other"}, "other; unknown"),
            (
                "baselines",
                {},
                {"baseline_artifact": {
                    "variant": "v", "source_sha256": "0" * 64, "versions": {"tensorflow": "2.20"},
                }},
                "unknown; v of 000000000000 on tensorflow 2.20",
            ),
        ],
    )  # fmt: skip
    def test_mixed_is_refused_unless_asked_for(self, what, row, details, named, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        ONE.save(tmp_path / "a")
        rows = tuple({**found, **row} for found in ONE.rows)
        Comparison(rows, {**DETAILS, **details}).save(tmp_path / "b")
        paths = [tmp_path / "a", tmp_path / "b"]
        with pytest.raises(InputError, match=rf"different .*{named}.*`mixed={what}`"):
            Comparison.from_files(paths)
        others = {"machines", "batch_sizes", "baselines"} - {what}
        with pytest.raises(InputError, match=f"`mixed={what}`"):
            Comparison.from_files(paths, others)
        assert len(Comparison.from_files(paths, [what]).rows) == 6

    def test_baselines_are_by_model(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            rows = tuple({**row, "model": name} for row in ONE.rows)
            Comparison(rows, {**DETAILS, "baseline": name}).save(tmp_path / name)
        both = Comparison.from_files([tmp_path / "a", tmp_path / "b"])
        assert set(both.table.baseline) == {"a", "b"}

    def test_mixed_lists_what_can_be(self, tmp_path):
        ONE.save(tmp_path)
        with pytest.raises(InputError, match="models cannot be mixed; what can is: machines, "):
            Comparison.from_files([tmp_path], ["models"])

    def test_no_files(self, tmp_path):
        with pytest.raises(InputError, match=r"at least one results.json"):
            Comparison.from_files([])
        with pytest.raises(InputError, match=r"No results at .*results.json; expected"):
            Comparison.from_files([tmp_path])
        with pytest.raises(InputError, match=r"No results at .*x.json; expected"):
            Comparison.from_files([tmp_path / "x.json"])

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", r"cut off or no JSON \(Expecting value: line 1 column 1"),
            ('{"format": 2, "rows": [{"model": "m", "var', r"cut off or no JSON \(Unterminated"),
            ("[]", "lacks the field 'format'"),
            ("7", "lacks the field 'format'"),
            ("{}", "lacks the field 'format'"),
            ('{"rows": [], "format": 99}', "has 99 in its field 'format'.* reads 2"),
            ('{"format": 2}', "no list of rows in its field 'rows'"),
            ('{"rows": 7, "format": 2}', "no list of rows in its field 'rows'"),
            ('{"rows": [7], "format": 2}', "no list of rows in its field 'rows'"),
            ('{"rows": [], "format": 2, "environment": 7}', "in its field 'environment'"),
            ('{"rows": [{"model": "m", "status": "ok"}], "format": 2}',
             r"rows\[0\].variant is missing; expected text"),
            ('{"rows": [{"model": "m", "variant": "v", "status": "ok", "median_ms": NaN}],'
             ' "format": 2}', r"is none in its field rows\[0\].median_ms; expected a number"),
            ('{"rows": [], "format": 2, "seconds": {"pilot": [1, Infinity]}}',
             r"field seconds.pilot\[1\]"),
            ('{"rows": [{"model": "m", "variant": "v", "status": "ok", "speedup": 1e999}],'
             ' "format": 2}', r"rows\[0\].speedup is inf"),
            ('{"rows": [{"model": "m", "variant": "v", "status": "ok", "speedup": "2"}],'
             ' "format": 2}', r"rows\[0\].speedup is '2'; expected a number or null"),
            ('{"rows": [{"model": "m", "variant": "v", "status": "ok", "chosen": 1}],'
             ' "format": 2}', r"rows\[0\].chosen is 1; expected true or false"),
        ],
    )  # fmt: skip
    def test_damaged_files_name_the_field(self, content, message, tmp_path):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(InputError, match=f"x.json.*{message}"):
            Comparison.from_files([tmp_path / "x.json"])

    def test_cut_off_anywhere(self, tmp_path):
        ONE.save(tmp_path)
        text = (tmp_path / "results.json").read_text()
        for end in range(0, len(text) - 2, 97):
            (tmp_path / "cut.json").write_text(text[:end])
            with pytest.raises(InputError, match=r"cut\.json is cut off"):
                Comparison.from_files([tmp_path / "cut.json"])

    def test_appear_as_a_whole_or_not_at_all(self, tmp_path):
        ONE.save(tmp_path)
        before = (tmp_path / "results.json").read_text()
        with pytest.raises(ValueError, match="JSON"):
            Comparison(ONE.rows, {"summary": math.nan}).save_json(tmp_path / "results.json")
        with pytest.raises(TypeError):
            Comparison(ONE.rows, {"summary": object()}).save_json(tmp_path / "results.json")
        assert (tmp_path / "results.json").read_text() == before
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "report.html", "results.csv", "results.json",
        ]  # fmt: skip


class TestRelativeTo:
    def test_is_the_ratio_of_medians(self):
        table = ONE.relative_to("float32(xla=True)@tensorflow")
        assert list(table.columns) == [*DESIGN, "ratio"]
        assert table.ratio.tolist()[:2] == [1.0, 8.0]
        assert pd.isna(table.ratio[2])
        assert ONE.relative_to("int8@litert").ratio.tolist()[:2] == [0.125, 1.0]

    def test_is_by_model_and_batch_size(self):
        rows = [
            {**row, "model": model, "batch_size": size, "median_ms": row["median_ms"] * factor}
            for model, size, factor in (("a", 1, 1), ("a", 8, 3), ("b", 1, 7))
            for row in (MEASURED, CHOSEN)
        ]
        rows.append({**MEASURED, "model": "alone", "variant": "int8@litert"})
        ratios = Comparison(tuple(rows)).relative_to(MEASURED["variant"]).ratio
        assert ratios.tolist()[:6] == [1, 8] * 3
        assert pd.isna(ratios[6])

    @pytest.mark.parametrize("variant", ["int8@nothing", "int8@openvino"])
    def test_unknown_lists_what_was_measured(self, variant):
        with pytest.raises(InputError) as caught:
            ONE.relative_to(variant)
        message = str(caught.value)
        assert repr(variant) in message
        assert message.endswith("there are: float32(xla=True)@tensorflow, int8@litert.")


class TestWide:
    def test_one_row_a_variant(self):
        wide = ONE.wide()
        assert wide.index.tolist() == [row["variant"] for row in ONE.rows]
        assert wide.columns.tolist() == ["digits"]
        assert wide.digits.tolist()[:2] == [1.0, 8.0]

    def test_columns_are_what_differs(self):
        rows = [
            {**row, "model": model, "batch_size": size}
            for model, size in (("a", 1), ("a", 8), ("b", 1))
            for row in (MEASURED, CHOSEN)
        ]
        wide = Comparison(tuple(rows)).wide("median_ms")
        assert wide.columns.names == ["model", "batch_size"]
        assert wide[("a", 8)].tolist() == [0.5, 0.0625]
        assert wide.shape == (2, 3)

    def test_files_tell_apart_what_nothing_else_does(self):
        rows = [{**MEASURED, "file": name, "machine": "M", "baseline": "B"} for name in "ab"]
        assert Comparison(tuple(rows)).wide().columns.tolist() == ["a", "b"]
        rows[1]["batch_size"] = 8
        assert Comparison(tuple(rows)).wide().columns.tolist() == [1, 8]

    def test_refuses_what_does_not_fit(self):
        with pytest.raises(InputError, match="int8@litert has several rows with the same model"):
            Comparison((CHOSEN, CHOSEN)).wide()
        with pytest.raises(InputError, match="speed is no column with figures; those are: batch"):
            ONE.wide("speed")


@st.composite
def measured_rows(draw):
    grid = st.integers(0, 4).map(float)  # few values, so that ties are common
    figures = draw(st.lists(st.tuples(grid, grid, grid), min_size=1, max_size=12))
    return tuple(
        {**MEASURED, "variant": f"v{i}", "speedup": x, "accuracy": y, "size_bytes": z}
        for i, (x, y, z) in enumerate(figures)
    )


class TestPareto:
    @settings(deadline=None)
    @given(measured_rows())
    def test_by_definition(self, given_rows):
        front = Comparison(given_rows).pareto(("speedup", "accuracy"), ("size_bytes",))

        def beats(a, b):
            pairs = [(a["speedup"], b["speedup"]), (a["accuracy"], b["accuracy"]),
                     (-a["size_bytes"], -b["size_bytes"])]  # fmt: skip
            return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)

        expected = {
            row["variant"] for row in given_rows
            if not any(beats(other, row) for other in given_rows)
        }  # fmt: skip
        assert set(front.variant) == expected
        assert front.speedup.is_monotonic_decreasing

    def test_leaves_out_what_was_not_measured(self):
        assert ONE.pareto().variant.tolist() == ["int8@litert", "float32(xla=True)@tensorflow"]
        over = {**CHOSEN, "variant": "over", "status": "over_budget", "speedup": 99.0}
        assert Comparison((*ONE.rows, over)).pareto().variant.tolist()[0] == "over"

    def test_without_accuracy_it_is_agreement(self):
        rows = tuple({**row, "accuracy": None} for row in ONE.rows)
        front = Comparison(rows).pareto()
        assert front.variant.tolist() == ["int8@litert"]  # both agree alike

    def test_unknown_column(self):
        with pytest.raises(InputError, match="speed is no column"):
            ONE.pareto(("speed",))


class TestText:
    def test_markdown(self):
        lines = ONE.to_markdown().splitlines()
        assert lines[0] == "| variant | status | median ms | speed-up | accuracy | drop ≤ | size |"
        assert lines[1] == "| :-- | :-- | --: | --: | --: | --: | --: |"
        assert lines[3].split(" | ")[2:4] == ["0.062", "8.00 (7.75–8.25)"]
        assert len(lines) == 5
        assert "a\\|b" in Comparison(({**MEASURED, "variant": "a|b"},)).to_markdown()

    def test_several_models_have_a_column(self):
        text = Comparison((MEASURED, {**CHOSEN, "model": "other"})).to_text()
        assert text.splitlines()[0].split()[:2] == ["model", "variant"]
        assert text.splitlines()[3].startswith("* other")

    def test_lines(self):
        lines = ONE.to_text().splitlines()
        assert lines[0].split() == [
            "variant", "status", "median", "ms", "speed-up", "accuracy", "drop", "≤", "size",
        ]  # fmt: skip
        assert set(lines[1]) == {"-"}
        assert lines[2].split() == [
            "float32(xla=True)@tensorflow", "ok", "0.500", "1.00", "(0.98–1.02)", "0.9833",
            "0.0037", "317", "kB",
        ]  # fmt: skip
        assert lines[3].startswith("* int8@litert")
        assert sum(line.startswith("*") for line in lines) == 1
        assert lines[4].split() == ["int8@openvino", "failed"]
        assert lines[5:7] == ["", "Not chosen because:"]
        assert lines[7] == f"  int8@openvino: {FAILED['reason']}"

    def test_without_failures_there_are_no_reasons(self):
        assert "because" not in Comparison((MEASURED, CHOSEN)).to_text()

    @given(st.lists(rows, max_size=4))
    def test_of_rows_with_figures_missing(self, given_rows):
        text = Comparison(tuple(given_rows)).to_text()
        for row in given_rows:
            assert row["status"] in text


class TestSize:
    @pytest.mark.parametrize(
        ("value", "text"),
        [(None, ""), (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (317_000, "317 kB"),
         (81_234, "81.2 kB"), (999_499, "999 kB"), (999_600, "1 MB"), (999_999, "1 MB"),
         (1_500_000, "1.5 MB"), (999_999_999, "1 GB"), (2.5e9, "2.5 GB"), (1.5e12, "1500 GB")],
    )  # fmt: skip
    def test_table(self, value, text):
        assert size(value) == text

    @given(st.integers(1, 10**13))
    def test_is_near_the_truth(self, value):
        number, unit = size(value).split()
        assert "e" not in number
        found = float(number) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
        assert found == pytest.approx(value, rel=0.005)


def test_rows_can_be_written_as_json():
    assert json.loads(json.dumps(MEASURED)) == MEASURED
    assert set(MEASURED) == set(COLUMNS)


class TestSharedReasons:
    ROWS = (
        {**MEASURED, "chosen": True},
        {**FAILED, "variant": "int8@openvino", "status": "failed", "reason": "No op <Foo>."},
        {**FAILED, "variant": "float16@openvino", "status": "failed", "reason": "No op <Foo>."},
        {**FAILED, "variant": "int8@litert", "status": "wrong", "reason": "Output y is zero."},
    )

    def test_are_printed_once(self):
        text = Comparison(self.ROWS).to_text()
        assert text.count("No op <Foo>.") == 1
        assert "  int8@openvino, float16@openvino: No op <Foo>." in text.splitlines()

    def test_stand_once_in_the_table_of_a_report(self):
        page = report.to_html(Comparison(self.ROWS))
        table = page.split("<tbody>")[1].split("</tbody>")[0]
        assert table.count(">No op &lt;Foo&gt;.<") == 1
        assert table.count("the same as int8@openvino") == 1

    def test_notebooks_show_a_table(self):
        shown = Comparison(self.ROWS, {"summary": "a < b"})._repr_html_()
        assert shown.startswith("<p>a &lt; b</p>")
        assert shown.count("<tr>") == 5
        assert shown.count("<b>") == 7  # the cells of the chosen row
        assert shown.count("No op &lt;Foo&gt;.") == 1

    def test_repr_is_one_short_line(self):
        shown = repr(Comparison(self.ROWS, {"chosen": "int8@litert"}))
        assert shown == "<Comparison of 4 variants, int8@litert chosen>"
