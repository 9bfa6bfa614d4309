import html.parser
import os
import re
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compare.test_comparison import CHOSEN, DETAILS, FAILED, MEASURED, ONE, rows
from tfopt.compare import report
from tfopt.compare.comparison import Comparison

NUM_COLUMNS = 13
LONG = "int8(calibration=percentile,operators=products)@onnxruntime"  # wider than a phone
OVER = {
    **MEASURED,
    "variant": LONG,
    "status": "over_budget",
    "median_ms": 0.25,
    "speedup": 2.0,
    "speedup_low": 1.9,
    "speedup_high": 2.1,
    "accuracy": 0.9,
    "reason": "The accuracy drop of 0.0833 exceeds 0.01.",
}
FOUR = Comparison(
    (MEASURED, CHOSEN, FAILED, OVER),
    {
        **DETAILS,
        "command": "tfopt optimize",
        "summary": f"{DETAILS['summary']} It was timed side by side with {LONG}.",
    },
)


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


class TestPage:
    def test_shows_every_variant_with_its_reason(self):
        page = Page(report.to_html(FOUR))
        for row in FOUR.rows:
            assert page.texts.count(row["variant"]) >= 2  # in the table and on its own
            assert not row["reason"] or page.texts.count(row["reason"]) == 2
        assert page.tags.count("tr") == 1 + len(FOUR.rows)
        assert page.tags.count("article") == len(FOUR.rows)
        assert FOUR.summary in page.texts
        assert page.attributes.count(("class", "chosen")) == 1
        text = " ".join(page.texts)
        for words in ("8.00 (7.75–8.25)", "no difference", "317 kB", "A CPU", "tensorflow: 2.21"):
            assert words in text
        assert "tfopt optimize" in page.texts

    def test_shows_what_is_inside(self):
        layer = {"name": "conv <1>", "op": "QLinearConv", "dtype": "int8", "time_ms": 0.25,
                 "executor": "", "share": 0.75}  # fmt: skip
        inside = {"diagnosis": ["1 of 6 layers <computes> in float32."], "layers": [layer]}
        page = Page(report.to_html(Comparison(({**MEASURED, **inside}, CHOSEN))))
        assert page.texts.count(inside["diagnosis"][0]) == 1
        assert page.tags.count("details") == 1
        for text in ("conv <1>", "QLinearConv", "int8", "0.25", "75%"):
            assert text in page.texts
        without = Page(report.to_html(Comparison(({**MEASURED, **inside, "layers": []},))))
        assert "details" not in without.tags

    def test_plot_has_a_point_for_each_measured_variant(self):
        text = report.to_html(FOUR)
        assert re.findall(r'<a href="#(row-\d)" class="([^"]*)"', text) == [
            ("row-0", "r2 ok"), ("row-1", "r0 ok chosen"), ("row-3", "r1 over_budget"),
        ]  # fmt: skip
        assert "int8@litert (chosen), 8.00 (7.75–8.25) times as fast" in text

    @pytest.mark.parametrize("factor", [1, 10])  # axes without and with logarithms
    def test_plot_shows_whole_intervals(self, factor):
        fastest = {**CHOSEN, "speedup": 2.0 * factor, "speedup_low": 1.6, "speedup_high": 40.0}
        text = report.to_html(Comparison((MEASURED, {**OVER, **fastest})))
        dots = re.findall(r'<a href="#row-.*?<circle class="dot" cx="([\d.]+)"', text, re.DOTALL)
        bars = re.findall(r'<path class="bar" d="M([\d.]+) [\d.]+H([\d.]+)"', text)
        first, last, left, right = map(float, (*dots, *bars[-1]))
        assert 70 < first < left < last < right < 740  # the first is the baseline's 1

    def test_without_figures_there_is_no_plot(self):
        assert "<svg" not in report.to_html(Comparison((FAILED,)))
        assert "<svg" not in report.to_html(Comparison(()))

    def test_agreement_takes_the_place_of_accuracy(self):
        text = report.to_html(Comparison(tuple({**row, "accuracy": None} for row in FOUR.rows)))
        assert "Speed-up against agreement of 3 variants" in text

    def test_every_link_leads_somewhere(self):
        page = Page(report.to_html(FOUR))
        ids = {value for name, value in page.attributes if name == "id"}
        links = [value for name, value in page.attributes if name == "href"]
        assert len(links) == 3 + 4 + 4  # plot, table, each variant
        assert {link.removeprefix("#") for link in links} <= ids

    def test_escapes_whatever_comes_from_outside(self):
        evil = "\"'><b>alert(1)</b>"
        row = {**MEASURED, "variant": evil, "reason": evil, "status": evil, "verdict": evil}
        details = {
            "model": evil, "summary": evil, "signature": evil, "baseline": evil, "metric": evil,
            "data": {evil: evil}, "budget": {evil: evil}, "command": evil, "files": [evil],
            "environment": {evil: evil, "versions": {evil: evil}},
        }  # fmt: skip
        page = Page(report.to_html(Comparison((row, {**row, "status": "ok"}), details)))
        assert "b" not in page.tags
        plain = Page(report.to_html(FOUR))
        assert set(page.tags) <= set(plain.tags)
        assert {name for name, _ in page.attributes} <= {name for name, _ in plain.attributes}
        assert page.texts.count(evil) >= 6

    @settings(deadline=None)
    @given(st.lists(rows, max_size=3), st.text(max_size=20))
    def test_is_one_well_formed_page_whatever_is_missing(self, given_rows, summary):
        text = report.to_html(Comparison(tuple(given_rows), {"summary": summary}))
        page = Page(text)
        assert page.tags.count("tr") == 1 + len(given_rows)
        assert page.tags.count("td") == NUM_COLUMNS * len(given_rows)
        assert page.tags.count("th") == NUM_COLUMNS

    def test_needs_no_network(self):
        text = report.to_html(FOUR)
        assert not {"link", "img", "iframe"} & set(Page(text).tags)
        assert "http" not in text
        assert "@import" not in text

    def test_is_what_is_saved(self, tmp_path):
        ONE.save(tmp_path)
        assert (tmp_path / "report.html").read_text(encoding="utf-8") == report.to_html(ONE)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; without it these tests are skipped, unless TFOPT_TEST_BROWSER is set."""
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        message = "Chromium and ChromeDriver are not installed"
        if os.environ.get("TFOPT_TEST_BROWSER"):
            pytest.fail(message)
        pytest.skip(message)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
        "disable-background-networking", "disable-component-update", "window-size=1200,900",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as found:
        yield found


@pytest.fixture
def page(browser, tmp_path):
    FOUR.save(tmp_path)
    browser.set_window_size(1200, 900)
    browser.get("about:blank")  # a change of the hash alone would not load the page again
    browser.get((tmp_path / "report.html").as_uri())
    return browser


def shown(page):
    """Variants of the rows that can be seen, from top to bottom."""
    rows = page.find_elements("css selector", "tbody tr")
    return [row.find_element("css selector", "td").text for row in rows if row.is_displayed()]


def head(page, title):
    return page.find_element("xpath", f"//th[button[text()='{title}']]")


class TestBrowser:
    def test_starts_without_an_error(self, page):
        assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
        assert shown(page) == [row["variant"] for row in FOUR.rows]
        assert page.find_element("id", "count").text == "4 of 4 variants"

    def test_a_click_on_a_head_sorts_and_another_turns_round(self, page):
        order = [
            "int8@litert",
            LONG,
            MEASURED["variant"],
            "int8@openvino",
        ]
        head(page, "median ms").find_element("tag name", "button").click()
        assert shown(page) == order
        assert head(page, "median ms").get_attribute("aria-sort") == "ascending"
        head(page, "median ms").find_element("tag name", "button").click()
        assert shown(page) == [*order[2::-1], order[3]]  # what was not measured stays last
        head(page, "speed-up (95 %)").find_element("tag name", "button").click()
        assert shown(page) == order
        assert head(page, "median ms").get_attribute("aria-sort") == "none"
        head(page, "variant").find_element("tag name", "button").click()
        assert shown(page) == sorted(order)

    def test_sorts_by_keyboard(self, page):
        button = head(page, "median ms").find_element("tag name", "button")
        page.execute_script("arguments[0].focus()", button)
        page.switch_to.active_element.send_keys("\ue007")  # Enter
        assert shown(page)[0] == "int8@litert"

    def test_filters_by_words_and_status(self, page):
        page.find_element("id", "search").send_keys("int8 openv")
        assert shown(page) == ["int8@openvino"]
        assert page.find_element("id", "count").text == "1 of 4 variants"
        page.find_element("id", "search").clear()
        page.find_element("id", "search").send_keys("\ue003 ")
        page.find_element("css selector", "input[value=failed]").click()
        assert "int8@openvino" not in shown(page)
        assert len(shown(page)) == 3

    def test_points_have_the_colour_of_their_runtime(self, page):
        def color(selector):
            return page.find_element("css selector", selector).value_of_css_property("stroke")

        points = {color(f".plot a[href='#row-{i}'] circle") for i in (0, 3)}  # 1 is the chosen one
        assert len(points) == 2
        legend = {color(f".plot g.r{i} > circle") for i in range(3)}
        assert len(legend) == 3
        assert points < legend

    def test_hover_shows_the_figures_of_a_point(self, page):
        from selenium.webdriver import ActionChains

        point = page.find_element("css selector", ".plot a[href='#row-3']")
        tip = point.find_element("css selector", ".tip")
        assert tip.value_of_css_property("visibility") == "hidden"
        ActionChains(page).move_to_element(point.find_element("tag name", "circle")).perform()
        assert tip.value_of_css_property("visibility") == "visible"
        assert "over the budget" in tip.text

    def test_a_click_on_a_point_leads_to_its_row(self, page):
        page.find_element("css selector", ".plot a[href='#row-1'] circle").click()
        assert page.current_url.endswith("#row-1")
        row = page.find_element("id", "row-1")
        assert "inset" in row.value_of_css_property("box-shadow")  # it is marked

    def test_a_click_on_a_point_finds_a_hidden_row(self, page):
        page.find_element("css selector", "input[value=over_budget]").click()
        assert LONG not in shown(page)
        page.find_element("css selector", ".plot a[href='#row-3'] circle").click()
        assert LONG in shown(page)

    def test_a_click_on_a_variant_leads_to_its_part(self, page):
        page.find_element("link text", "int8@openvino").click()
        assert page.current_url.endswith("#variant-2")
        article = page.find_element("id", "variant-2")
        top = page.execute_script("return arguments[0].getBoundingClientRect().top", article)
        assert 0 <= top < 900

    def test_points_can_be_reached_by_keyboard(self, page):
        from selenium.webdriver import ActionChains

        ActionChains(page).send_keys("\ue004").perform()  # Tab
        assert page.switch_to.active_element.get_dom_attribute("href") == "#row-0"
        ActionChains(page).send_keys("\ue007").perform()
        assert page.current_url.endswith("#row-0")

    @pytest.mark.parametrize("width", [360, 800, 1600])
    def test_fits_any_width(self, width, browser, page):
        page.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        try:
            wide = page.execute_script("return document.documentElement.scrollWidth")
            assert wide <= width  # only the table scrolls sideways
        finally:
            page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def test_follows_the_dark_mode(self, page):
        def brightness():
            color = page.execute_script("return getComputedStyle(document.body).backgroundColor")
            return sum(map(int, re.findall(r"\d+", color)[:3]))

        assert brightness() > 600
        scheme = {"name": "prefers-color-scheme", "value": "dark"}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        try:
            assert brightness() < 150
        finally:
            page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
