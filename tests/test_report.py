"""The report's page: every number on it, nothing from outside it, and no name taken for markup."""

from __future__ import annotations

import base64
import html
import json
import re
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from test_cli import compared, one_line, run
from test_figures import made_table

import wda
from wda import comparison as comparison_module
from wda import figures, reporting
from wda.diagnosis import Finding
from wda.draws import Draws
from wda.errors import LocationError, MissingExtraError, OutputError, TableError
from wda.report import ReportContents, check_installed, interactive, notebook_html, write_report
from wda.report.pictures import png, svg, within
from wda.report.words import differences, headline
from wda.statistics import compute_statistics

HOSTILE = "</script><script>hacked = 1</script><img src=x onerror='hacked = 1'>%{x} & <b>b</b>"


def full_statistics(table: pd.DataFrame) -> pd.DataFrame:
    """Statistics with every column that a report may show, whatever computes them."""
    return compute_statistics(table).assign(
        runs=1,
        clusters=6,
        pearson_r_low=0.64,
        pearson_r_high=0.92,
        within_layer_r=0.991,
        within_layer_r_low=0.98,
        within_layer_r_high=1.0,
        between_layer_r=-0.2146,
        between_layer_r_low=np.nan,
        between_layer_r_high=np.nan,
        null="rank 8",
        null_r_low=0.91,
        null_r_high=0.98,
        null_p=0.0004,
        reading="r lies inside the band of random rank-8 updates: no more than chance",
    )


def made_comparisons(first: str = "lora", second: str = "dora") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "run_a": [first],
            "run_b": [second],
            "method_a": ["lora"],
            "method_b": ["dora"],
            "matrix": ["query"],
            "per": ["output"],
            "matched": ["step"],
            "n_a": [24],
            "n_b": [23],
            "clusters": [6],
            "r_difference": [-0.3],
            "r_difference_low": [-0.5],
            "r_difference_high": [0.1],
            "slope_difference": [12.34],
            "slope_difference_low": [1.0],
            "slope_difference_high": [23.0],
            "note": ["only 23 points match"],
        }
    )


def made_draws(table: pd.DataFrame) -> Draws:
    rng = np.random.default_rng(1)
    shape = (len(table), 5)
    return Draws(np.full(len(table), "isotropic"), rng.random(shape), rng.random(shape))


def full_contents() -> ReportContents:
    table = made_table(matrices=("query", "value"))
    table["below_floor"] = pd.array([True, False] * (len(table) // 2), dtype="boolean")
    statistics = full_statistics(table)
    return ReportContents(
        title="Three runs",
        table=table,
        statistics=statistics,
        comparisons=made_comparisons(),
        draws=made_draws(table),
        provenance={
            "command": "wda compare runs/ft",
            "wda": "9.9.9",
            "base": {"location": "hf://org/base"},
            "checkpoints": [{"run": "ft", "path": f"/data/ft/checkpoint-{i}"} for i in range(30)],
        },
        notes=["encoder.pooler is not read"],
        findings={
            "ft": [
                Finding("ok", "can be read", "yes"),
                Finding("wrong", "numbers are finite", "not 3", "train again"),
            ]
        },
        figures={"scatter": figures.scatter_grid(table, statistics)},
    )


@pytest.fixture(autouse=True)
def close_figures() -> object:
    yield
    plt.close("all")


def written(contents: ReportContents, folder: Path) -> str:
    write_report(contents, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.raw: dict[str, str] = {"script": "", "style": ""}
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, _: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in self.raw:
            self.raw[self._inside] += data
        else:
            self.text += data

    def words(self) -> str:
        return " ".join(self.text.split())


def test_an_estimate_stands_with_its_interval_and_what_is_unknown_is_a_dash() -> None:
    table = made_table(runs=("lora",))
    statistics = full_statistics(table).assign(
        pearson_r=0.8349, slope=-1234.5, slope_low=np.nan, slope_high=np.nan
    )
    statistics.loc[1, ["pearson_r", "null_r_low"]] = np.nan
    shown = headline(statistics)
    assert shown.iloc[0].to_dict() == {
        "run": "lora",
        "matrix": "query",
        "n": "24",
        "clusters": "6",
        "r": "+0.83 [+0.64, +0.92]",
        "r within layers": "+0.99 [+0.98, +1.00]",
        "r between layers": "−0.21",
        "slope": "−1.23e+03",
        "random updates": "rank 8",
        "their r": "+0.91 to +0.98",
        "p": "< 0.001",
        "reading": "r lies inside the band of random rank-8 updates: no more than chance",
    }
    assert (shown["r"][1], shown["their r"][1]) == ("–", "–")


def test_statistics_of_today_alone_are_enough() -> None:
    statistics = compute_statistics(made_table(runs=("lora",)))
    basic = statistics[["run", "method", "matrix", "per", "n", "pearson_r", "slope", "intercept"]]
    assert list(headline(basic)) == ["run", "matrix", "n", "r", "slope"]


def test_runs_of_a_method_together_are_named_by_it() -> None:
    statistics = full_statistics(made_table(runs=("seed 0",)))
    statistics["run"] = pd.array([pd.NA] * len(statistics), dtype="string")
    shown = headline(statistics.assign(method="dora", runs=3))
    assert set(shown["run"]) == {"DoRA, 3 runs together"}


def test_axes_and_granularities_are_told_where_they_differ() -> None:
    statistics = full_statistics(made_table(runs=("lora",)))
    assert "vectors" not in headline(statistics)
    statistics["granularity"] = ["vector", "head"]
    assert list(headline(statistics)["vectors"]) == ["output", "output, by head"]


def test_differences_are_first_minus_second() -> None:
    (row,) = differences(made_comparisons()).to_dict(orient="records")
    assert (row["first"], row["second"]) == ("lora", "dora")
    assert row["difference of r"] == "−0.30 [−0.50, +0.10]"
    assert row["difference of slope"] == "+12.3 [+1.00, +23.0]"
    assert (row["n"], row["note"]) == ("24, 23", "only 23 points match")
    both = pd.concat([made_comparisons(), made_comparisons().assign(per="input")])
    assert list(differences(both)["vectors"]) == ["output", "input"]


def numbers(values: object) -> np.ndarray:
    """Give an array as plotly writes it: a list, or the bytes of one."""
    if isinstance(values, dict):
        return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"])
    return np.asarray(values, dtype=float)


def traces(contents: ReportContents, kind: str) -> list[dict]:
    shown = interactive.points(contents.table, contents.draws)
    data = interactive.figure(interactive.traces(shown, contents.statistics))["data"]
    return [trace for trace in data if trace["meta"]["kind"] == kind]


def belonging(frame: pd.DataFrame, trace: dict) -> pd.DataFrame:
    """Give the rows of a table or of statistics that a trace is drawn from."""
    run, matrix = trace["meta"]["run"], trace["meta"]["matrix"]
    of_run = frame[frame["run"] == run]
    of_matrix = of_run[of_run["matrix"] == matrix]
    return of_run if of_matrix.empty else of_matrix


def test_the_interactive_points_are_the_tables_to_the_last_digit() -> None:
    contents = full_contents()
    seen = 0
    for trace in traces(contents, "points"):
        low = trace["marker"]["color"] == "#a0a0a0"
        rows = belonging(contents.table, trace)
        rows = rows[rows["below_floor"] == low]
        assert np.array_equal(numbers(trace["x"]), rows["delta_d"])
        assert np.array_equal(numbers(trace["y"]), rows["delta_m"])
        assert set(rows["matrix"]) == {trace["meta"]["label"]}
        assert [where for where, _ in trace["customdata"]] == [
            f"layer {layer}" for layer in rows["layer"]
        ]
        assert [when for _, when in trace["customdata"]] == [f"step {s}" for s in rows["step"]]
        assert ("rounding floor" in trace["hovertemplate"]) == low
        seen += len(rows)
    assert seen == len(contents.table)


def test_the_lines_are_rows_of_the_statistics() -> None:
    contents = full_contents()
    lines = traces(contents, "line")
    assert len(lines) == len(contents.statistics) == 9
    for line in lines:
        rows = belonging(contents.table, line)
        (fit,) = belonging(contents.statistics, line).to_dict(orient="records")
        assert line["x"] == [rows["delta_d"].min(), rows["delta_d"].max()]
        assert np.allclose(line["y"], fit["slope"] * np.array(line["x"]) + fit["intercept"])


def test_random_updates_are_the_mean_of_their_rows_draws() -> None:
    contents = full_contents()
    assert contents.draws is not None
    (trace,) = [t for t in traces(contents, "random") if t["meta"]["run"] == "dora"][:1]
    rows = ((contents.table["run"] == "dora") & (contents.table["matrix"] == "query")).to_numpy()
    assert np.allclose(numbers(trace["x"]), contents.draws.delta_d[rows].mean(axis=1))
    assert np.allclose(numbers(trace["y"]), contents.draws.delta_m[rows].mean(axis=1))
    assert traces(replace(contents, draws=None), "random") == []


def test_the_page_tells_everything(tmp_path: Path) -> None:
    page = Page(written(full_contents(), tmp_path))
    for said in (
        "Three runs",
        "hf://org/base",
        "/data/ft",
        "[+0.64, +0.92]",
        "no more than chance",
        "only 23 points match",
        "encoder.pooler is not read",
        "wrong numbers are finite: not 3 train again",
        "1 check passed",
        "wda 9.9.9",
        '"… 10 more, in provenance.json"',
    ):
        assert said in page.words()


def test_the_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    page = Page(written(full_contents(), tmp_path))
    links = {"src", "href", "srcset", "action", "data", "poster", "background", "ping"}
    asked = [
        value or "" for _, attrs in page.tags for name, value in attrs.items() if name in links
    ]
    assert asked
    assert [a[:40] for a in asked if not a.startswith(("data:", "#"))] == []
    assert re.findall(r"url\(|@import", page.raw["style"]) == []
    (policy,) = [a["content"] for t, a in page.tags if a.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_the_page_can_be_read_aloud(tmp_path: Path) -> None:
    page = Page(written(full_contents(), tmp_path))
    assert ("html", {"lang": "en"}) in page.tags
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.tags if tag == "th")
    assert Counter(tag for tag, _ in page.tags)["h1"] == 1


def hostile_contents() -> ReportContents:
    contents = full_contents()
    rename = {"lora": HOSTILE, "query": HOSTILE}
    table = contents.table.replace(rename).assign(module=HOSTILE)
    table.loc[0, "layer"] = pd.NA  # so that the module's name is on its hover label
    return replace(
        contents,
        title=HOSTILE,
        table=table,
        statistics=contents.statistics.replace(rename).assign(reading=HOSTILE, null=HOSTILE),
        comparisons=made_comparisons(HOSTILE, HOSTILE).assign(note=HOSTILE),
        provenance={
            HOSTILE: HOSTILE,
            "wda": HOSTILE,
            "time": HOSTILE,
            "base": {"location": HOSTILE},
            "checkpoints": [{"run": HOSTILE, "path": HOSTILE}],
        },
        notes=[HOSTILE],
        findings={HOSTILE: [Finding("wrong", HOSTILE, HOSTILE, HOSTILE)]},
        figures={HOSTILE: contents.figures["scatter"]},
    )


def test_names_are_text_wherever_they_stand(tmp_path: Path) -> None:
    tame = Page(written(full_contents(), tmp_path))
    page = Page(written(hostile_contents(), tmp_path))
    count = [Counter(tag for tag, _ in p.tags) for p in (tame, page)]
    assert count[0]["script"] == count[1]["script"] == 3
    assert count[0]["img"] == count[1]["img"] == 1
    assert count[0]["b"] == count[1]["b"]
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    # Title twice, run and matrix in each table, note, finding, provenance, …
    assert page.text.count(HOSTILE) > 30
    (written_json,) = re.findall(
        r'<script type="application/json" id="scatter-data">(.*?)</script>',
        (tmp_path / "report.html").read_text(),
        re.DOTALL,
    )
    data = json.loads(written_json)["data"]
    for trace in data:
        said = [
            trace["name"],
            trace["meta"].get("label", ""),
            *(where for where, _ in trace.get("customdata", [])),
        ]
        assert not any("<" in one.replace("<br>", "") or "%{" in one for one in said)
    (name,) = {t["name"] for t in data if t["meta"]["run"] == HOSTILE and "x-thin" in str(t)}
    assert html.unescape(name.replace("<br>", "")).replace(" ", "") == HOSTILE.replace(" ", "")


def test_empty_pieces_have_no_section(tmp_path: Path) -> None:
    table = made_table(runs=("lora",))
    page = Page(written(ReportContents("Bare", table, compute_statistics(table)), tmp_path))
    ids = {attrs["id"] for tag, attrs in page.tags if tag == "section"}
    assert ids == {"compared", "result", "points", "warnings", "provenance"}
    assert not {"img", "select"} & {tag for tag, _ in page.tags}
    assert "Nothing was left out of the table." in page.words()


def test_one_point_and_no_numbers_at_all_are_pages_too(tmp_path: Path) -> None:
    table = made_table(layers=1, steps=1, runs=("lora",))
    page = Page(written(ReportContents("One", table, compute_statistics(table)), tmp_path))
    assert "n r slope" not in page.words()  # nothing could be fitted
    assert "Point at a point" in page.words()
    table = table.assign(delta_d=np.nan, step=pd.NA, layer=pd.NA, seed=pd.NA)
    page = Page(written(ReportContents("None", table, compute_statistics(table)), tmp_path))
    assert "there is no point to draw" in page.words()
    assert page.raw["script"] == ""


def test_tables_of_earlier_versions_have_a_report(tmp_path: Path) -> None:
    table = made_table(runs=("lora",))
    statistics = compute_statistics(table)
    old = table.drop(columns=["below_floor", "granularity", "head", "rank"])
    assert "lora" in written(ReportContents("Old", old, statistics), tmp_path)
    with pytest.raises(TableError, match="columns missing: delta_m"):
        write_report(
            ReportContents("x", old.drop(columns="delta_m"), statistics), tmp_path / "x.html"
        )


def test_large_comparisons_keep_under_8_mb(tmp_path: Path) -> None:
    table = made_table(layers=80, steps=40, matrices=("query", "key", "value"))
    statistics = full_statistics(table)
    figure = figures.scatter(table[table["matrix"] == "query"], statistics).figure
    drawn = dict.fromkeys(["scatter-1", "scatter-2"], figure)
    contents = ReportContents("Large", table, statistics, draws=made_draws(table), figures=drawn)
    text = written(contents, tmp_path)
    assert len(table) == 28_800
    assert (tmp_path / "report.html").stat().st_size < 8_000_000
    sources = [attrs["src"] or "" for tag, attrs in Page(text).tags if tag == "img"]
    assert [source[:14] for source in sources] == ["data:image/png"] * 2  # smaller in pixels
    assert sum(map(len, sources)) < 1_200_000
    assert "12,000 of 28,800 rows are drawn" in Page(text).words()
    assert len(interactive.points(table)) == interactive.MOST_POINTS


def test_figures_too_large_as_vectors_are_pixels() -> None:
    table = made_table(layers=80, steps=40, runs=("lora",))
    figure = figures.scatter_grid(table, compute_statistics(table))
    vector, fine, coarse = len(svg(figure)), len(png(figure, 220)), len(png(figure, 110))
    assert vector > 2 * fine > 3 * coarse
    # Not to the letter: matplotlib's layout moves a little with every drawing.
    assert len(within(figure, 2 * vector)) == pytest.approx(vector, rel=0.01)
    assert len(within(figure, vector // 2)) == pytest.approx(fine, rel=0.05)
    assert len(within(figure, fine // 2)) == pytest.approx(coarse, rel=0.05)


def test_figures_are_vectors_where_they_are_small(tmp_path: Path) -> None:
    text = written(full_contents(), tmp_path)
    assert 'src="data:image/svg+xml;base64,' in text
    assert text == written(full_contents(), tmp_path)  # and the same bytes each time


def test_what_is_missing_is_named_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_installed()
    monkeypatch.setitem(sys.modules, "plotly", None)
    wanted = r"report: needs plotly; try: pip install 'weight-decomposition-analysis\[report\]'"
    with pytest.raises(MissingExtraError, match=wanted):
        check_installed()
    with pytest.raises(MissingExtraError, match=wanted):
        write_report(full_contents(), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    broken = replace(full_contents(), findings={"ft": [object()]})  # type: ignore[dict-item]
    with pytest.raises(Exception, match="verdict"):
        write_report(broken, tmp_path / "report.html")
    assert [f.read_text() for f in tmp_path.iterdir()] == ["old"]
    with pytest.raises(OutputError, match="cannot be written to"):
        write_report(full_contents(), tmp_path / "report.html" / "report.html")


def test_notebooks_show_a_comparison_with_the_base_install_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    table = made_table().replace({"lora": "<b>lora</b>"})
    statistics = compute_statistics(table)
    comparison = wda.Comparison(table, {}, ("<i>note</i>",))
    shown = comparison._repr_html_()
    assert shown == notebook_html(table, statistics, ("<i>note</i>",))
    page = Page(shown)
    assert {"b", "i"}.isdisjoint(tag for tag, _ in page.tags)
    assert page.text.count("<b>lora</b>") == 2
    r = statistics["pearson_r"].iloc[0]
    assert f"{r:+.2f}".replace("-", "−") in page.text
    (source,) = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert source is not None
    assert base64.b64decode(source.partition(",")[2]).startswith(b"\x89PNG")
    assert not plt.get_fignums()


def test_compare_writes_a_report_with_the_doctors_findings(
    runs: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    result = compared(runs, base, tmp_path / "out", "--report")
    assert result.exit_code == 0, result.output
    assert "provenance.json, report.html" in result.stderr
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "FT, LoRA and DoRA against their base" in page.words()
    assert page.words().count("what the doctor found in its newest checkpoint") == 3
    assert len(re.findall(r"\d checks passed, nothing suspicious", page.words())) == 3
    assert not plt.get_fignums()


def test_a_report_needs_a_folder_and_its_packages_before_the_work(
    runs: dict[str, Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison_module, "open_all", None)  # the work would fail on it
    result = run("compare", runs["ft"], "--base", base, "--report")
    assert result.exit_code == 2
    assert "add --out" in result.output
    monkeypatch.setitem(sys.modules, "jinja2", None)
    line = one_line(compared(runs, base, tmp_path / "out", "--report"))
    assert "report: needs jinja2; try: pip install" in line
    assert not (tmp_path / "out").exists()


def test_the_doctor_does_not_fetch_what_lies_elsewhere(
    runs: dict[str, Path], hub: type, tmp_path: Path
) -> None:
    comparison = wda.compare([runs["lora"]], base="hf://org/pico", progress=False)
    of = wda.Manifest(runs=[{"path": str(runs["lora"])}]).runs  # type: ignore[list-item]
    reporting.report(comparison, tmp_path / "report.html", of, progress=False)
    words = Page((tmp_path / "report.html").read_text()).words()
    assert "the doctor looked at it: no, for it would have to be fetched: wda doctor" in words


def test_what_the_doctor_cannot_open_is_told(
    runs: dict[str, Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise LocationError("gone: no such folder")

    monkeypatch.setattr(reporting, "diagnose", lost)
    comparison = wda.compare([runs["lora"]], base=base, progress=False)
    of = wda.Manifest(runs=[{"path": str(runs["lora"])}]).runs  # type: ignore[list-item]
    reporting.report(comparison, tmp_path / "report.html", of, progress=False)
    words = Page((tmp_path / "report.html").read_text()).words()
    assert "suspicious the doctor looked at it: no gone: no such folder" in words
