"""The report as a reader has it: in a browser, from disk, without a network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from test_figures import made_table
from test_report import HOSTILE, full_contents, full_statistics, hostile_contents

from wda.report import ReportContents, write_report

webdriver = pytest.importorskip("selenium.webdriver")

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    # Whatever the page would ask for lies nowhere.
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars"),
)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium without a window and without a network."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no chromium here; install it with: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    running.execute_cdp_cmd("Network.enable", {})
    nothing = {"latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    running.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": True, **nothing})
    yield running
    running.quit()


class Opened:
    """A report in the browser, and what a reader does with it."""

    def __init__(self, chromium: Any, contents: ReportContents, folder: Path) -> None:
        self.chromium = chromium
        self.contents = contents
        write_report(contents, folder / "report.html")
        plt.close("all")
        self.resize(1280)
        chromium.get_log("browser")
        chromium.get((folder / "report.html").as_uri())
        self.wait("document.querySelectorAll('#scatter .point').length > 0")

    def resize(self, width: int) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def ask(self, script: str) -> Any:
        return self.chromium.execute_script(f"return {script.strip()}")

    def wait(self, script: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.chromium, 20).until(lambda _: self.ask(script), script)

    def all(self, css: str) -> list[Any]:
        return list(self.chromium.find_elements("css selector", css))

    def choose(self, what: str, option: str) -> None:
        from selenium.webdriver.support.ui import Select

        Select(self.all(f"select[data-choice={what}]")[0]).select_by_visible_text(option)

    def points(self) -> set[tuple[str, str, str, float, float]]:
        """Give what is drawn: run, matrix and vectors, ΔD and ΔM."""
        told = self.ask("""
            document.getElementById("scatter")._fullData
                .filter((t) => t.visible === true && t.meta.kind === "points")
                .flatMap((t) => [...t.x].map((x, i) =>
                    [t.meta.run, t.meta.matrix, t.meta.vectors, x, t.y[i]]))""")
        assert len(self.all("#scatter .scatterlayer .point")) >= len(told)
        return {tuple(one) for one in told}

    def table_points(self, **fields: str) -> set[tuple[str, str, str, float, float]]:
        rows = self.contents.table
        for name, value in fields.items():
            rows = rows[rows[name] == value]
        columns = ["run", "matrix", "per", "delta_d", "delta_m"]
        return {tuple(row) for row in rows[columns].to_numpy().tolist()}

    def names(self) -> list[str]:
        return [one.text for one in self.all("#scatter .legendtext")]

    def click_name(self, position: int) -> None:
        self.chromium.execute_script("document.getElementById('scatter').scrollIntoView()")
        self.pointer().click(self.all("#scatter .legendtoggle")[position]).perform()

    def pointer(self) -> Any:
        return webdriver.ActionChains(self.chromium, duration=50)


def two_axes() -> ReportContents:
    """Contents with two matrices and two kinds of vectors, all numbers different."""
    contents = full_contents()
    contents.table.loc[0, ["delta_d", "delta_m"]] = 0.006, 0.08  # apart from the others
    more = contents.table.assign(
        per="input",
        delta_d=3 * contents.table["delta_d"],
        delta_m=2 * contents.table["delta_m"],
    )
    table = pd.concat([contents.table, more], ignore_index=True)
    return replace(contents, table=table, statistics=full_statistics(table), draws=None)


@pytest.fixture(scope="module")
def opened(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return Opened(chromium, two_axes(), tmp_path_factory.mktemp("report"))


@pytest.fixture(autouse=True)
def afresh(request: pytest.FixtureRequest) -> None:
    """Open the page anew before each test that shares it."""
    if "opened" in request.fixturenames:
        page = request.getfixturevalue("opened")
        page.resize(1280)
        page.chromium.refresh()
        page.wait("document.querySelectorAll('#scatter .point').length > 0")


def test_it_opens_from_disk_without_a_network_or_a_complaint(opened: Opened) -> None:
    assert opened.ask("location.protocol") == "file:"
    assert opened.chromium.get_log("browser") == []
    assert opened.ask("performance.getEntriesByType('resource').map((e) => e.name)") == []
    assert all(opened.ask("[...document.images].map((i) => i.complete && i.naturalWidth > 100)"))
    # The network is away, indeed.
    opened.chromium.execute_script("new Image().src = 'https://example.org/x.png'")
    opened.wait("performance.now() > 500")
    assert "Content Security Policy" in str(opened.chromium.get_log("browser"))


def test_pointing_at_a_point_tells_what_it_is(opened: Opened) -> None:
    low = opened.contents.table.iloc[0]
    assert low["below_floor"]
    position = opened.ask("""
        (() => {
            const plot = document.getElementById("scatter");
            plot.scrollIntoView();
            const trace = plot._fullData.find((t) => t.marker?.color === "#a0a0a0");
            const {xaxis, yaxis} = plot._fullLayout;
            const box = plot.getBoundingClientRect();
            return [
                box.x + xaxis._offset + xaxis.c2p(trace.x[0]),
                box.y + yaxis._offset + yaxis.c2p(trace.y[0]),
            ];
        })()""")
    move = opened.pointer()
    move.w3c_actions.pointer_action.move_to_location(*map(int, position))
    move.perform()
    opened.wait("document.querySelector('#scatter .hoverlayer .hovertext') !== null")
    said = opened.ask(
        "[...document.querySelectorAll('#scatter .hovertext tspan')].map((t) => t.textContent)"
    )
    assert said[:2] == ["ft", f"layer {low['layer']}, query"]
    assert said[2] == f"step {low['step']}"
    values = [float(line.split()[1].replace("−", "-")) for line in said[3:5]]
    assert np.allclose(values, [low["delta_d"], low["delta_m"]], rtol=5e-4)
    assert said[5] == "under three times its rounding floor"


def test_a_click_in_the_legend_shows_one_run_alone_and_another_all(opened: Opened) -> None:
    assert opened.names() == ["ft", "lora", "dora"]
    everything = opened.table_points(matrix="query", per="output")
    assert opened.points() == everything
    opened.click_name(1)
    opened.wait("document.querySelectorAll('#scatter .scatterlayer .point').length === 24")
    lora = opened.table_points(run="lora", matrix="query", per="output")
    assert opened.points() == lora
    opened.choose("matrix", "value")  # the others stay away
    assert opened.points() == opened.table_points(run="lora", matrix="value", per="output")
    opened.wait("performance.now() > 1500")  # no double click
    opened.click_name(1)
    opened.wait("document.querySelectorAll('#scatter .scatterlayer .point').length === 72")
    assert opened.points() == opened.table_points(matrix="value", per="output")


def test_matrix_and_vectors_are_chosen(opened: Opened) -> None:
    opened.choose("matrix", "value")
    assert opened.points() == opened.table_points(matrix="value", per="output")
    opened.choose("vectors", "input")
    assert opened.points() == opened.table_points(matrix="value", per="input")
    opened.choose("matrix", "all of them")
    assert opened.points() == opened.table_points(per="input")
    assert opened.names() == ["ft", "lora", "dora"]
    lines = "document.querySelectorAll('#scatter .scatterlayer .js-line').length"
    assert opened.ask(lines) == 3  # those of all matrices


def test_random_updates_are_shown_on_request(chromium: Any, tmp_path: Path) -> None:
    page = Opened(chromium, full_contents(), tmp_path)
    count = "document.querySelectorAll('#scatter .scatterlayer .point').length"
    assert page.ask(count) == 72
    page.all("input[data-choice=random]")[0].click()
    page.wait(f"{count} === 144")
    assert page.names() == ["ft", "lora", "dora"]


def test_a_dark_page_has_a_dark_plot(opened: Opened) -> None:
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    opened.chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    ground = "getComputedStyle(document.querySelector('#scatter .main-svg')).background"
    opened.wait(f"{ground}.includes('rgb(22, 23, 26)')")
    opened.chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    opened.wait(f"{ground}.includes('rgb(255, 255, 255)')")


def test_names_are_drawn_as_they_are_and_run_nothing(chromium: Any, tmp_path: Path) -> None:
    page = Opened(chromium, hostile_contents(), tmp_path)
    assert page.ask("typeof hacked") == "undefined"
    assert page.chromium.get_log("browser") == []
    assert page.ask("document.title") == HOSTILE
    assert page.ask("document.querySelector('h1').textContent") == HOSTILE
    texts = page.ask(
        "[...document.querySelectorAll('#scatter .legendtext')].map((t) => t.textContent)"
    )
    assert texts[1].replace(" ", "") == HOSTILE.replace(" ", "")
    # Of the one row outside the layers the label tells the module, then the matrix.
    page.chromium.execute_script("""
        const plot = document.getElementById("scatter");
        const outside = (t) => t.customdata?.findIndex(([where]) => !where.startsWith("layer"));
        const curveNumber = plot._fullData.findIndex((t) => outside(t) >= 0);
        const pointNumber = outside(plot._fullData[curveNumber]);
        Plotly.Fx.hover(plot, [{curveNumber, pointNumber}]);
    """)
    said = page.ask("document.querySelector('#scatter .hovertext').textContent")
    assert said.replace(" ", "").startswith(f"ft{HOSTILE},{HOSTILE}step100ΔD".replace(" ", ""))
    assert page.ask("document.querySelector('#scatter :is(a, b, image)')") is None
    page.choose("matrix", "value")
    page.choose("matrix", HOSTILE)
    assert page.points()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_window(width: int, chromium: Any, tmp_path: Path) -> None:
    long = "organisation_" + "long_model_name" * 8  # nowhere to break it
    table = made_table(runs=(long, "lora"), matrices=("query", long)).assign(module=long)
    contents = replace(
        full_contents(),
        title=long,
        table=table,
        statistics=full_statistics(table),
        notes=[long],
        draws=None,
        provenance={"base": {"location": long}, "command": long},
    )
    page = Opened(chromium, contents, tmp_path)
    page.resize(width)
    for fold in page.all("summary"):
        page.chromium.execute_script("arguments[0].click()", fold)
    page.wait(f"document.querySelector('#scatter .main-svg').getAttribute('width') < {width}")
    assert page.ask("innerWidth") == width
    assert page.ask("document.documentElement.scrollWidth") <= width
    # Nor is anything cut off that cannot be scrolled to.
    outside = page.ask("""
        [...document.querySelectorAll("main *, header *, footer *")]
            .filter((e) => !e.closest(".table, .paper, #scatter"))
            .filter((e) => e.getBoundingClientRect().right > innerWidth + 1)
            .map((e) => e.outerHTML.slice(0, 80))""")
    assert outside == []
