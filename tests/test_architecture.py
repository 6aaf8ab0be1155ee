"""The house's rule: a room imports only from rooms above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "wda"

# From the ground up. What stands on one line may not import from each other.
ROOMS: list[set[str]] = [
    {"_version", "errors", "kernels", "signals", "safetensors_writing"},
    {"places", "fused"},
    {"remote"},
    {"files", "locations", "progress", "provenance", "validation", "decomposition", "table"},
    {"draws", "naming", "rows", "style"},
    {"floors", "statistics"},
    {"updates", "changes"},
    {"checkpoints"},
    {"manifest"},
    {"runs", "figures"},
    {"pairing", "inspection", "origins", "conversion", "report"},
    {"plan", "diagnosis", "merging", "opening"},
    {"engine", "spectra"},
    {"schedule"},
    {"cache", "cluster", "nulls", "filling", "notes"},
    {"comparison"},
    {"reporting"},
    {"adapters"},
    {"callbacks", "training"},
    {"demo", "sweeps"},
    {"console"},
    {"console_training"},
    {"cli"},
    {"__main__"},
]
WITHOUT_TORCH = ("table", "draws", "statistics", "style", "figures", "spectra", "report")


def room_of(module: str) -> str:
    return module.split(".")[1]


def imports(file: Path) -> set[str]:
    """Rooms that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "wda":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("wda."):
            found.add(room_of(node.module or ""))
        elif isinstance(node, ast.Import):
            found |= {room_of(a.name) for a in node.names if a.name.startswith("wda.")}
    return found


def files() -> dict[Path, str]:
    return {
        file: file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for file in PACKAGE.rglob("*.py")
        if file.name != "__init__.py" or file.parent != PACKAGE
    }


def test_every_room_has_its_place() -> None:
    assert set(files().values()) == set().union(*ROOMS)


def test_rooms_import_only_from_rooms_above() -> None:
    floor = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}
    wrong = [
        f"{file.relative_to(PACKAGE)} imports {other}"
        for file, room in files().items()
        for other in imports(file)
        if other != room and floor[other] >= floor[room]
    ]
    assert wrong == []


def test_the_path_does_not_know_the_trainer() -> None:
    path = set().union(*ROOMS[:17])
    wrong = [
        str(f)
        for f, room in files().items()
        if room in path and imports(f) & {"adapters", "callbacks", "training"}
    ]
    assert wrong == []


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_saved_tables_are_refitted_and_redrawn_without_torch(room: str) -> None:
    code = f"import sys, wda.{room}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys, wda.cli\n"
        "heavy = {'torch', 'pandas', 'numpy', 'matplotlib', 'scipy', 'transformers', 'pydantic'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_modules_stay_small() -> None:
    long = {f.name: n for f in files() if (n := len(f.read_text().splitlines())) > 400}
    assert long == {}
