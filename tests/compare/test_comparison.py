import csv
import html.parser
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
    "p90_ms", "p99_ms", "speedup", "speedup_low", "speedup_high", "verdict", "cold_start_ms",
    "throughput_per_s", "size_bytes", "compressed_bytes", "peak_memory_bytes", "accuracy",
    "accuracy_drop", "accuracy_drop_high", "agreement", "max_abs_error", "reason",
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
    "speedup": 1.0,
    "speedup_low": 0.98,
    "speedup_high": 1.02,
    "verdict": "no_difference",
    "cold_start_ms": 812.25,
    "throughput_per_s": 2000.0,
    "size_bytes": 317_000,
    "compressed_bytes": 290_000,
    "peak_memory_bytes": 512_000_000,
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
        **found, "variant": variant, "status": status, "reason": reason
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
        both.save(tmp_path)
        merged = Comparison.from_files([tmp_path])
        assert len(merged.rows) == 6
        assert "int8@litert" in merged.to_text()

    def test_merged_results_keep_their_machine(self, tmp_path):
        for name in ("a", "b", "c"):
            (tmp_path / name).mkdir()
            ONE.save(tmp_path / name)
        Comparison.from_files([tmp_path / "a", tmp_path / "b"]).save(tmp_path)
        assert len(Comparison.from_files([tmp_path, tmp_path / "c"]).rows) == 9

    def test_different_machines_are_refused(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            details = {**DETAILS, "environment": {"cpu": f"CPU {name}"}}
            Comparison(ONE.rows, details).save(tmp_path / name)
        with pytest.raises(InputError, match=r"different machines \(CPU a, CPU b\).*on one"):
            Comparison.from_files([tmp_path / "a", tmp_path / "b"])

    def test_no_files(self, tmp_path):
        with pytest.raises(InputError, match=r"at least one results.json"):
            Comparison.from_files([])
        with pytest.raises(InputError, match=r"No results at .*results.json; expected"):
            Comparison.from_files([tmp_path])
        with pytest.raises(InputError, match=r"No results at .*x.json; expected"):
            Comparison.from_files([tmp_path / "x.json"])

    @pytest.mark.parametrize(
        "content",
        ["", "{", "[]", "7", "{}", '{"rows": []}', '{"rows": [], "format": 2}',
         '{"rows": 7, "format": 1}', '{"rows": [7], "format": 1}'],
    )  # fmt: skip
    def test_other_files(self, content, tmp_path):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(InputError, match=r"x.json is no results.json of this version"):
            Comparison.from_files([tmp_path / "x.json"])

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


class TestText:
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


class Page(html.parser.HTMLParser):
    """Tags and text of a page, as a browser reads it."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.texts.append(data)


class TestReport:
    def test_shows_every_variant_with_its_reason(self):
        page = Page(report.to_html(ONE))
        for row in ONE.rows:
            assert row["variant"] in page.texts
            assert not row["reason"] or row["reason"] in page.texts
        assert page.tags.count("tr") == 1 + len(ONE.rows)
        assert ONE.summary in page.texts
        assert page.attributes.count(("class", "chosen")) == 1
        text = " ".join(page.texts)
        for words in ("8.00 (7.75–8.25)", "no difference", "317 kB", "A CPU", "tensorflow 2.21"):
            assert words in text

    def test_escapes_whatever_comes_from_outside(self):
        evil = "\"'><script>alert(1)</script>"
        row = {**MEASURED, "variant": evil, "reason": evil, "status": evil, "verdict": evil}
        details = {
            "model": evil, "summary": evil, "signature": evil, "baseline": evil, "metric": evil,
            "data": {evil: evil}, "budget": {evil: evil},
            "environment": {evil: evil, "versions": {evil: evil}},
        }  # fmt: skip
        text = report.to_html(Comparison((row,), details))
        page = Page(text)
        assert "script" not in page.tags
        assert set(page.tags) == set(Page(report.to_html(ONE)).tags)
        names = {name for name, _ in Page(report.to_html(ONE)).attributes}
        assert {name for name, _ in page.attributes} <= names
        assert page.texts.count(evil) >= 4

    @given(st.lists(rows, max_size=3), st.text(max_size=20))
    def test_is_one_well_formed_page_whatever_is_missing(self, given_rows, summary):
        text = report.to_html(Comparison(tuple(given_rows), {"summary": summary}))
        page = Page(text)
        assert page.tags.count("tr") == 1 + len(given_rows)
        assert page.tags.count("td") == 13 * len(given_rows) == 13 * (page.tags.count("tr") - 1)
        assert page.tags.count("th") == 13

    def test_needs_no_network(self):
        text = report.to_html(ONE)
        assert not {"link", "img", "iframe"} & set(Page(text).tags)
        assert "http" not in text

    def test_is_what_is_saved(self, tmp_path):
        ONE.save(tmp_path)
        assert (tmp_path / "report.html").read_text(encoding="utf-8") == report.to_html(ONE)


def test_rows_can_be_written_as_json():
    assert json.loads(json.dumps(MEASURED)) == MEASURED
    assert set(MEASURED) == set(COLUMNS)
