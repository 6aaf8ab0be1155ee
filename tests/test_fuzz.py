"""Damaged and hostile files: a message or the truth, never another exception, code run or flood.

Every fixture of every layout is damaged in many ways, each from a seed of its own.
"""

from __future__ import annotations

import json
import pickle
import random
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_fixtures import FIXTURES, manifest

import wda
from wda.checkpoints import open_checkpoint
from wda.diagnosis import diagnose
from wda.errors import WdaError
from wda.inspection import inspect
from wda.merging import merge

JSON = (".json", ".yaml")
ABSURD = [None, -1, 0, 1e308, 10**30, "", "x", [], {}, [[]], True, "../../etc/passwd", "\x00"]


def truncated(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.randrange(len(data))]


def flipped_in_front(data: bytes, dice: random.Random) -> bytes:
    spoilt = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        spoilt[dice.randrange(min(len(data), 400))] ^= 1 << dice.randrange(8)
    return bytes(spoilt)


def flipped_anywhere(data: bytes, dice: random.Random) -> bytes:
    spoilt = bytearray(data)
    for _ in range(20):
        spoilt[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return bytes(spoilt)


def absurd_length(data: bytes, dice: random.Random) -> bytes:
    length = dice.choice([2**64 - 1, 2**63, 2**40, len(data), 0])
    return struct.pack("<Q", length) + data[8:]


def filled(data: bytes, dice: random.Random) -> bytes:
    start = dice.randrange(len(data))
    return data[:start] + bytes([dice.choice([0, 255])]) * (len(data) - start)


def absurd_field(data: bytes, dice: random.Random) -> bytes:
    """Replace or take away a field of a JSON file, at any depth."""
    try:
        content = json.loads(data)
    except ValueError:
        return truncated(data, dice)
    inner = content
    while isinstance(inner, dict) and inner:
        key = dice.choice(sorted(inner))
        if isinstance(inner[key], dict) and inner[key] and dice.random() < 0.7:
            inner = inner[key]
            continue
        if dice.random() < 0.3:
            del inner[key]
        else:
            inner[key] = dice.choice(ABSURD)
        break
    return json.dumps(content).encode()


DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [
    truncated,
    flipped_in_front,
    flipped_anywhere,
    absurd_length,
    filled,
]


def damaged(fixture: Path, folder: Path, dice: random.Random) -> None:
    """Damage one file of a copy of a fixture's checkpoint."""
    original = own(fixture)
    copy = folder / original.name
    for old in folder.glob("checkpoint*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    if original.is_dir():
        shutil.copytree(original, copy)
        files = sorted(path for path in copy.rglob("*") if path.is_file() and path.stat().st_size)
    else:
        shutil.copy(original, copy)
        files = [copy]
    file = dice.choice(files)
    damage = absurd_field if file.suffix in JSON else dice.choice(DAMAGES)
    file.write_bytes(damage(file.read_bytes(), dice))


def own(fixture: Path) -> Path:
    return next(path for path in fixture.iterdir() if path.stem == "checkpoint")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["peft-0.13-dora", "lycoris-4.1", "torchtune-llama-dora", "gptq"])
@pytest.mark.parametrize("command", ["inspect", "doctor", "merge"])
def test_every_command_meets_damage_with_a_message(command: str, name: str, tmp_path: Path) -> None:
    fixture = next(path for path in FIXTURES if path.name == name)
    run: dict[str, Callable[[Path], object]] = {
        "inspect": lambda path: inspect(str(path)),
        "doctor": lambda path: diagnose(path, fixture / "base", progress=False),
        "merge": lambda path: merge(path, tmp_path / "out", fixture / "base", progress=False),
    }
    for seed in range(12):
        damaged(fixture, tmp_path, random.Random(f"{command} {name} {seed}"))
        try:
            run[command](own(tmp_path))
        except WdaError:
            pass
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fixture", FIXTURES[::4], ids=lambda path: path.name)
def test_damaged_bases_give_messages(fixture: Path, tmp_path: Path) -> None:
    options = json.loads((fixture / "about.json").read_text()).get("options", {})
    (tmp_path / own(fixture).name).symlink_to(own(fixture))
    for seed in range(10):
        dice = random.Random(f"base of {fixture.name} {seed}")
        shutil.rmtree(tmp_path / "base", ignore_errors=True)
        shutil.copytree(fixture / "base", tmp_path / "base")
        files = sorted(path for path in (tmp_path / "base").rglob("*") if path.is_file())
        file = dice.choice(files)
        damage = absurd_field if file.suffix in JSON else dice.choice(DAMAGES)
        file.write_bytes(damage(file.read_bytes(), dice))
        try:
            wda.compare(manifest(tmp_path, options, tmp_path), cache=False, progress=False)
        except WdaError:
            pass
        except Exception as error:
            raise AssertionError(f"seed {seed} of {fixture.name}: {error!r}") from error


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.name)
def test_damaged_checkpoints_give_messages(fixture: Path, tmp_path: Path) -> None:
    options = json.loads((fixture / "about.json").read_text()).get("options", {})
    (tmp_path / "base").symlink_to(fixture / "base")
    refused = 0
    for seed in range(25):
        damaged(fixture, tmp_path, random.Random(f"{fixture.name} {seed}"))
        try:
            table = wda.compare(
                manifest(tmp_path, options, tmp_path), cache=False, progress=False
            ).table
        except WdaError as error:
            refused += 1
            assert str(tmp_path) in str(error) or "checkpoint" in str(error)
        except Exception as error:
            raise AssertionError(f"seed {seed} of {fixture.name}: {error!r}") from error
        else:
            assert not table.delta_m.isin([float("inf")]).any()
    assert refused > 2


def test_no_shard_lies_outside_the_folder(tmp_path: Path) -> None:
    save_file({"secret.weight": torch.ones(2, 2)}, tmp_path / "secret.safetensors")
    for outside in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), ".."):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        index = {"weight_map": {"secret.weight": outside}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(WdaError, match="shard"):
            open_checkpoint(folder)


def test_no_shard_of_a_distributed_checkpoint_lies_outside_either(tmp_path: Path) -> None:
    fixture = next(path for path in FIXTURES if path.name == "dcp")
    folder = tmp_path / "checkpoint"
    shutil.copytree(own(fixture), folder)
    described = (folder / ".metadata").read_bytes()
    outside = "../0_0.distc"
    shutil.copy(folder / "__0_0.distcp", tmp_path / "0_0.distc")
    (folder / ".metadata").write_bytes(described.replace(b"__0_0.distcp", outside.encode()))
    with pytest.raises(WdaError, match=r"names \.\./0_0\.distc, which is no file beside it"):
        open_checkpoint(folder)


class Runs:
    """What it is unpickled as writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (f"open({str(self.target)!r}, 'w').close()",)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "place",
    [
        "pytorch_model.bin",
        "x.pt",
        "x.ckpt",
        "adapter_model.bin",
        "adapter_model.pt",
        "lit_model.pth.lora",
        "non_lora_trainables.bin",
        ".metadata",
        "mp_rank_00_model_states.pt",
    ],
)
def test_no_pickle_runs_code(place: str, tmp_path: Path) -> None:
    trap, folder = tmp_path / "ran", tmp_path / "model"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    for protocol in range(2, 6):
        for zipped in (False, True):
            with (folder / place).open("wb") as file:
                if zipped:
                    torch.save({"a": Runs(trap)}, file, pickle_protocol=protocol)
                else:
                    pickle.dump({"a": Runs(trap)}, file, protocol)
            for path in (folder, folder / place):
                with pytest.raises(WdaError):
                    open_checkpoint(path)
                assert not trap.exists()


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))


@pytest.mark.parametrize("what", ["zip", "safetensors"])
def test_files_that_would_flood_the_memory_are_refused(what: str, tmp_path: Path) -> None:
    if what == "zip":
        file = tmp_path / "bomb.pt"
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb:
            with bomb.open("bomb/data.pkl", "w", force_zip64=True) as entry:
                for _ in range(256):
                    entry.write(bytes(1 << 24))
            bomb.writestr("bomb/version", "3")
    else:
        file = tmp_path / "bomb.safetensors"
        header = {"a.weight": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 8]}}
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    code = (
        "import sys\nfrom pathlib import Path\nfrom wda.checkpoints import open_checkpoint\n"
        "from wda.errors import WdaError\n"
        "try:\n    open_checkpoint(Path(sys.argv[1]))\n"
        "except WdaError as error:\n    print(error)\n    sys.exit(7)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(file)],
        check=False,
        capture_output=True,
        text=True,
        preexec_fn=limited,
        timeout=120,
    )
    assert done.returncode == 7, done.stderr
    assert str(file) in done.stdout
