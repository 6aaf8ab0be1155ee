"""Comparing what lies elsewhere: the same numbers, from the fewest bytes, over bad connections."""

from __future__ import annotations

import importlib
import json
import pickle
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import (
    PICO_LAYERS,
    moved,
    pico_weights,
    save_model,
    save_pico_adapter,
    wda_command,
)
from rich.progress import Progress
from safetensors.torch import save_file
from servers import STALL, Counting, FakeGoogle, Files, Hub, s3_server, serving
from typer.testing import CliRunner

import wda
from wda.cli import app
from wda.comparison import plan
from wda.errors import (
    CheckpointError,
    LocationError,
    ManifestError,
    MissingExtraError,
    SelectionError,
)
from wda.locations import locate
from wda.remote import fetch

WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up soon, wait little, and make every matrix travel in several parts."""
    for name, value in {"timeout": 3, "tries": 4, "wait": 0.01}.items():
        monkeypatch.setattr(fetch.PATIENCE, name, value)
    monkeypatch.setattr(fetch, "PART", 150)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[type[Files], str]]:
    (tmp_path / "site").mkdir()
    with serving(Files, tmp_path / "site") as (handler, address):
        yield handler, address


def table(*what: object, base: object, **options: object) -> pd.DataFrame:
    options = {"cache": False, "progress": False, **options}
    return wda.compare([str(w) for w in what], base=str(base), **options).table  # type: ignore[arg-type]


def same(left: pd.DataFrame, right: pd.DataFrame) -> None:
    assert len(left)
    pd.testing.assert_frame_equal(left, right, check_exact=True)


def header_of(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def chosen_bytes(weights: Tensors, *labels: str) -> int:
    return sum(
        tensor.nbytes
        for name, tensor in weights.items()
        if name.endswith(tuple(f".{label}.weight" for label in labels))
    )


def save_shards(folder: Path, weights: Tensors) -> dict[str, str]:
    """Save queries, values, and the rest in a shard each."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = ("query.weight", "value.weight")
    shard_of = {
        name: next((i for i, kind in enumerate(kinds, 1) if name.endswith(kind)), 3)
        for name in weights
    }
    files = {name: f"model-{i:05d}-of-00003.safetensors" for name, i in shard_of.items()}
    for file in set(files.values()):
        save_file({n: t for n, t in weights.items() if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return files


# --- A web server -------------------------------------------------------------------------------


def test_only_headers_and_chosen_matrices_travel(site: tuple[type[Files], str]) -> None:
    handler, address = site
    base, tuned = pico_weights(), moved(pico_weights(), 0.02, seed=1)
    save_model(handler.folder / "base", base)
    save_model(handler.folder / "ft", tuned)
    expected = table(handler.folder / "ft", base=handler.folder / "base", matrices=["value"])
    readings = plan([f"{address}/ft"], base=f"{address}/base", matrices=["value"])
    told = {r.location: r.tensor_bytes + r.header_bytes for r in readings}
    headers_alone = dict(handler.served)
    handler.served.clear()
    same(table(f"{address}/ft/", base=f"{address}/base", matrices=["value"]), expected)
    for name in ("base", "ft"):
        file = handler.folder / name / WEIGHTS
        assert headers_alone[f"{name}/{WEIGHTS}"] == header_of(file)
        served = handler.served[f"{name}/{WEIGHTS}"]
        assert served == told[f"{address}/{name}"]
        assert served <= 1.01 * chosen_bytes(base, "value") + header_of(file)
    assert all(wanted for _, wanted in handler.asked)


def test_only_the_shards_that_are_needed_are_opened(site: tuple[type[Files], str]) -> None:
    handler, address = site
    save_shards(handler.folder / "base", pico_weights())
    save_shards(handler.folder / "ft", moved(pico_weights(), 0.02, seed=1))
    expected = table(handler.folder / "ft", base=handler.folder / "base", matrices=["query"])
    same(table(f"{address}/ft", base=f"{address}/base", matrices=["query"]), expected)
    asked = {name.rpartition("/")[2] for name, _ in handler.asked}
    assert asked == {"model-00001-of-00003.safetensors", "model.safetensors.index.json"}
    with pytest.raises(SelectionError, match=r"no matrix .* 'gate'; labels .* key \(3\), query"):
        table(f"{address}/ft", base=f"{address}/base", matrices=["gate"])


def test_a_shard_that_lacks_what_the_index_says(site: tuple[type[Files], str]) -> None:
    handler, address = site
    files = save_shards(handler.folder / "base", pico_weights())
    query = next(name for name in files if name.endswith("query.weight"))
    shard = handler.folder / "base" / files[query]
    save_file({"other": torch.zeros(1)}, shard)
    with pytest.raises(CheckpointError, match=r"index.json: tensors named in it are in no shard: "):
        table(handler.folder / "base", base=f"{address}/base", matrices=["query"])
    shard.unlink()
    with pytest.raises(LocationError, match=r"model-00001-of-00003.safetensors: no such file"):
        table(f"{address}/base", base=f"{address}/base", matrices=["query"])


def test_several_requests_are_in_flight(site: tuple[type[Files], str]) -> None:
    import threading

    handler, address = site
    (handler.folder / "a.bin").write_bytes(bytes(range(200)) * 3)
    meeting = threading.Barrier(4)  # the four parts of 150 bytes arrive together or not at all

    def meet(server: Files, name: str, headers: dict[str, str], body: bool) -> None:
        if server.headers["Range"] != "bytes=0-7":
            meeting.wait(timeout=5)
        Files.send_file(server, name, headers, body)

    handler.send_file = meet
    assert locate(f"{address}/a.bin").read(0, 600) == bytes(range(200)) * 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("fault", ["503", "500", "429", "stall", "drop", "truncate", "short"])
def test_bad_connections(
    site: tuple[type[Files], str], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, address = site
    if fault == "stall":
        monkeypatch.setattr(fetch.PATIENCE, "timeout", 0.4)
    save_model(handler.folder / "base", pico_weights())
    ft = save_model(handler.folder / "ft", moved(pico_weights(), 0.02, seed=1))
    expected = table(ft, base=handler.folder / "base")
    handler.faults |= {f"base/{WEIGHTS}": [fault, fault], f"ft/{WEIGHTS}": [fault]}
    same(table(f"{address}/ft", base=f"{address}/base"), expected)
    assert handler.faults == {f"base/{WEIGHTS}": [], f"ft/{WEIGHTS}": []}
    if fault in ("drop", "truncate", "short"):
        # What came before the break is not fetched once more.
        told = plan([f"{address}/ft"], base=f"{address}/base")
        counted = sum(r.tensor_bytes + r.header_bytes for r in told)
        headers = sum(r.header_bytes for r in told)
        served = sum(n for name, n in handler.served.items() if name.endswith(WEIGHTS))
        assert served == counted + headers


def test_a_server_that_asks_to_wait_is_given_time(
    site: tuple[type[Files], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, address = site
    save_model(handler.folder / "base", pico_weights())
    waits: list[float] = []
    monkeypatch.setattr("wda.remote.fetch.time.sleep", waits.append)
    monkeypatch.setattr(fetch, "PART", 1 << 20)
    handler.faults[f"base/{WEIGHTS}"] = ["503", "503", "503", "429"]
    with pytest.raises(LocationError, match=r"base/model.safetensors: cannot be read, tried 4 tim"):
        plan([f"{address}/base"], base=f"{address}/base")
    handler.faults[f"base/{WEIGHTS}"] = ["503", "503", "429"]
    plan([f"{address}/base"], base=f"{address}/base")
    assert waits == [0.01, 0.02, 0.04, 0.01, 0.02, 1.0]


def test_a_server_that_stays_down_is_given_up(
    site: tuple[type[Files], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, address = site
    monkeypatch.setattr(fetch, "PART", 1 << 20)
    save_model(handler.folder / "base", pico_weights())
    monkeypatch.setattr(fetch.PATIENCE, "timeout", 0.2)
    handler.faults[f"base/{WEIGHTS}"] = ["stall"] * 9
    with pytest.raises(
        LocationError, match=r"safetensors: cannot be read, tried 4 times: .*timed out; try again l"
    ):
        plan([f"{address}/base"], base=f"{address}/base")
    assert fetch.PATIENCE.timeout < STALL


def test_a_server_without_ranges_is_refused(site: tuple[type[Files], str]) -> None:
    handler, address = site
    weights = {"layer.0.query.weight": torch.zeros(4096, 4096)}
    save_model(handler.folder / "base", weights)
    handler.ranges = False
    with pytest.raises(LocationError, match=r"this server sends whole files only \(no range req"):
        table(handler.folder / "base", base=f"{address}/base")
    deadline = time.monotonic() + 5
    while sum(handler.served.values()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sum(handler.served.values()) == 0  # the connection was closed on it
    assert len(handler.asked) == 1


def test_a_file_that_changes_while_it_is_read(site: tuple[type[Files], str]) -> None:
    handler, address = site
    save_model(handler.folder / "base", pico_weights())
    place = locate(f"{address}/base") / WEIGHTS
    assert place.is_file()
    save_model(handler.folder / "base", pico_weights(seed=1))
    with pytest.raises(LocationError, match=r"model.safetensors: changed while it was read; comp"):
        place.read(8, 100)  # type: ignore[attr-defined]
    (handler.folder / "base" / WEIGHTS).unlink()
    with pytest.raises(LocationError, match=r"HTTP 404 .*; it is not there any more; comp"):
        place.read(8, 100)  # type: ignore[attr-defined]


def test_a_folder_cannot_be_listed_over_http(
    site: tuple[type[Files], str], tmp_path: Path, base: Path
) -> None:
    handler, address = site
    for step in (1, 2):
        save_model(handler.folder / f"ft/checkpoint-{step}", moved(pico_weights(), 0.1, seed=step))
    with pytest.raises(CheckpointError, match=r"/ft: none of the files .* name the steps in a man"):
        table(f"{address}/ft", base=base)
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(f"base: {base}\nruns: [{{path: '{address}/ft', steps: [2, 1]}}]\n")
    far = wda.compare(manifest, progress=False).table
    same(far, table(handler.folder / "ft", base=base))
    assert list(far["run"].unique()) == ["ft"]


def test_runs_are_looked_for_and_opened_side_by_side(
    site: tuple[type[Files], str], tmp_path: Path
) -> None:
    import threading

    handler, address = site
    for name in ("base", "one", "two", "three"):
        save_model(handler.folder / name, moved(pico_weights(), 0.1, seed=len(name)))
    meetings = {name: threading.Barrier(3) for name in ("recipe.yaml", "adapter_config.json")}
    plain = handler.answer

    def meet(server: Files, body: bool) -> None:
        folder, _, name = server.path.lstrip("/").partition("/")
        if folder != "base" and name in meetings:
            meetings[name].wait(timeout=5)
        plain(server, body)

    handler.answer = meet
    assert len(plan([f"{address}/{n}" for n in ("one", "two", "three")], f"{address}/base")) == 4


def test_opening_shows_how_far_it_is(
    site: tuple[type[Files], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from wda.progress import progress_bar

    handler, address = site
    save_model(handler.folder / "base", pico_weights())
    for step in (1, 2, 3):
        save_model(handler.folder / f"ft/checkpoint-{step}", moved(pico_weights(), 0.1, seed=step))
    manifest = tmp_path / "manifest.yaml"
    runs = f"[{{path: '{address}/ft', steps: [1, 2, 3]}}, {{path: '{address}/base', name: same}}]"
    manifest.write_text(f"base: '{address}/base/{WEIGHTS}'\nruns: {runs}\n")
    bars, seen = [], []

    @contextmanager
    def watched(show: bool) -> Iterator[Progress]:
        with progress_bar(show) as bar:
            bars.append(bar)
            yield bar

    def answer(server: Files, body: bool) -> None:
        task = bars[-1].tasks[0]
        seen.append((task.description, task.completed, task.total))
        plain(server, body)

    plain, handler.answer = handler.answer, answer
    monkeypatch.setattr("wda.comparison.progress_bar", watched)
    plan(manifest, progress=False)
    assert seen[0] == ("opening", 0, None)  # while the checkpoints are looked for
    assert seen[-1] == ("opening", 4, 5)  # the base comes last
    assert capsys.readouterr().err == ""
    plan(manifest, progress=True)
    assert re.search(r"opening .* 5/5 +100%", capsys.readouterr().err)
    wda.compare(manifest, cache=False, progress=True)
    assert re.search(r"opening .* 5/5 +100%(?s:.*)comparing .* 6/6", capsys.readouterr().err)


def test_an_adapter_and_its_settings_come_from_afar(
    site: tuple[type[Files], str], base: Path
) -> None:
    handler, address = site
    tensors = save_pico_adapter(handler.folder / "dora", "dora")
    (handler.folder / "dora" / "trainer_state.json").write_text('{"global_step": 7}')
    same(table(f"{address}/dora", base=base), table(handler.folder / "dora", base=base))
    file = "dora/adapter_model.safetensors"
    assert handler.served[file] == header_of(handler.folder / file) + sum(
        tensor.nbytes for tensor in tensors.values()
    )


def test_a_fused_projection_travels_once(site: tuple[type[Files], str]) -> None:
    handler, address = site
    base = {f"h.{i}.attn.c_attn.weight": torch.randn(6, 18) for i in range(3)}
    save_model(handler.folder / "base", base)
    save_model(handler.folder / "ft", moved(base, 0.1, seed=1))
    expected = table(handler.folder / "ft", base=handler.folder / "base")
    assert len(expected) == 6
    same(table(f"{address}/ft", base=f"{address}/base"), expected)
    for name in ("base", "ft"):
        fused = sum(tensor.nbytes for tensor in base.values())
        file = f"{name}/{WEIGHTS}"
        assert handler.served[file] == fused + header_of(handler.folder / file)


def test_every_dtype_comes_as_it_is_stored(site: tuple[type[Files], str]) -> None:
    from wda.checkpoints.remote_safetensors import DTYPES
    from wda.checkpoints.tensors import open_tensors

    handler, address = site
    numbers = torch.arange(24).reshape(2, 3, 4)
    tensors = {name: numbers.to(dtype) for name, dtype in DTYPES.items()}
    save_file(
        {**tensors, "none": torch.zeros(0, 3), "one": torch.tensor(1.5)},
        handler.folder / "m.safetensors",
    )
    far, near = (open_tensors(p / "m.safetensors") for p in (locate(address), handler.folder))
    assert far.shapes == near.shapes
    for name in near:
        assert torch.equal(far.read(name), near.read(name)), name
        assert (far.read(name).dtype, far[name].nbytes) == (
            near.read(name).dtype,
            near[name].nbytes,
        )
    some = slice(1, 2)
    assert torch.equal(far.read("F32", rows=[some]), numbers[some].float())


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"abc", "too short for a header"),
        (b"\xff" * 40, "bytes does not fit"),
        (b"\x05" + bytes(7) + b"{nope", "the header is no JSON of named tensors"),
        (b"\x02" + bytes(7) + b"{}more", "the header tells of 10 bytes"),
    ],
)
def test_damaged_files(site: tuple[type[Files], str], content: bytes, why: str, base: Path) -> None:
    handler, address = site
    (handler.folder / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"truncated or corrupt \({len(content)} b.*{why}"):
        table(base, base=f"{address}/{WEIGHTS}")


def test_pickles_are_not_fetched(site: tuple[type[Files], str], base: Path) -> None:
    handler, address = site
    (handler.folder / "m").mkdir()
    torch.save(pico_weights(), handler.folder / "m" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"a pickle can be read only whole \(\d+ bytes\) and"):
        table(base, base=f"{address}/m")
    assert sum(handler.served.values()) == 8


def test_a_token_goes_to_no_other_server(tmp_path: Path) -> None:
    from wda.remote.http import read_range

    (tmp_path / "a.bin").write_bytes(bytes(range(100)))
    with (
        serving(Files, tmp_path) as (far, elsewhere),
        serving(Files, tmp_path) as (near, address),
    ):

        def redirect(server: Files, body: bool) -> None:
            near.authorized.append(server.headers["Authorization"])
            target = {"/here": "/a.bin", "/there": f"{elsewhere}/a.bin"}.get(server.path)
            if target is None:
                server.send_file("a.bin", {}, body)
            else:
                server.send(302, b"", {"Location": target}, body)

        near.answer = redirect
        for path in ("here", "there"):
            into = bytearray(10)
            came, size, _ = read_range(
                f"{address}/{path}", 5, memoryview(into), "a.bin", {"authorization": "Bearer x"}
            )
            assert (came, size, bytes(into)) == (10, 100, bytes(range(5, 15)))
        assert set(near.authorized) == {"Bearer x"}
        assert far.authorized == [None]


@pytest.mark.parametrize(
    ("status", "why"),
    [
        (401, "HTTP 401 Unauthorized; it wants a login; write https://USER:PASSWORD@SERVER/PATH"),
        (403, "HTTP 403 Forbidden; it may not be read; if the address was signed, sign it anew"),
        (410, "HTTP 410 Gone; it is not there any more; compare again"),
        (418, "HTTP 418 I'm a Teapot; check the location"),
    ],
)
def test_a_server_that_refuses(
    site: tuple[type[Files], str], base: Path, status: int, why: str
) -> None:
    handler, address = site
    save_model(handler.folder / "base", pico_weights())
    plain = handler.send_file

    def refuse(server: Files, name: str, headers: dict[str, str], body: bool) -> None:
        if name.endswith(WEIGHTS) and server.headers["Range"] != "bytes=0-7":
            server.send(status, b"", {}, body)
        else:
            plain(server, name, headers, body)

    handler.send_file = refuse
    done = CliRunner().invoke(app, ["compare", str(base), "--base", f"{address}/base"])
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert f"wda: {address}/base/{WEIGHTS}: {why}" in done.stderr


def test_the_query_of_an_address_is_sent_but_never_shown(
    site: tuple[type[Files], str], base: Path
) -> None:
    handler, address = site
    save_model(handler.folder / "ft", moved(pico_weights(), 0.1, seed=1))
    asked: list[str] = []
    plain = handler.answer

    def answer(server: Files, body: bool) -> None:
        asked.append(server.path)
        plain(server, body)

    handler.answer = answer
    comparison = wda.compare([f"{address}/ft?key=secret"], base=base, progress=False)
    assert all(path.endswith("?key=secret") for path in asked)
    assert "secret" not in comparison.table.to_csv()
    assert "secret" not in json.dumps(comparison.provenance["checkpoints"])


def signed(address: str) -> str:
    """Put a login and a signature into an address, with a character no request may hold."""
    return f"{address.replace('://', '://me:hidden%21@')}?signature=hidden ü#hidden"


def test_secrets_of_an_address_are_sent_but_written_nowhere(
    site: tuple[type[Files], str], tmp_path: Path
) -> None:
    handler, address = site
    save_model(handler.folder / "base", pico_weights())
    save_model(handler.folder / "ft", moved(pico_weights(), 0.1, seed=1))
    what = ["compare", signed(f"{address}/ft"), f"--base={signed(f'{address}/base')}", "--no-cache"]
    out = tmp_path / "out"
    done = wda_command(*what, "--out", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = wda_command(*what, "--dry-run", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert set(handler.authorized) == {"Basic bWU6aGlkZGVuIQ=="}  # me:hidden!
    texts = [file.read_bytes() for file in out.iterdir()]
    shown = "".join([done.stdout, done.stderr, told.stdout, told.stderr])
    assert len(texts) == 8
    assert not any(b"hidden" in text for text in [*texts, shown.encode()])
    facts = json.loads((out / "provenance.json").read_text())
    assert facts["base"]["location"] == f"{address}/base"
    assert facts["command"] == (
        f"wda compare {address}/ft --base={address}/base --no-cache --out {out}"
    )


@pytest.mark.parametrize(
    ("base", "why"),
    [
        ("ftp://server/base", "ftp://server/base: ftp:// is not a kind of location"),
        ("http:///base", "http:///base: no server in it"),
        ("http://[server/base", r"http://\[server/base: is no address \(Invalid IPv6 URL\); exp"),
        ("http://server:x/base", r"http://server:x/base: is no address \(Port could not be cast"),
        (
            "http://127.0.0.1:9/base",
            "cannot be read, tried 4 times: .*refused",
        ),
    ],
)
def test_secrets_are_in_no_error(base: str, why: str, runs: dict[str, Path]) -> None:
    done = CliRunner().invoke(app, ["compare", str(runs["ft"]), "--base", signed(base)])
    assert done.exit_code == 1
    assert re.search(why, done.stderr), done.stderr
    assert "hidden" not in done.stderr


def test_secrets_in_a_manifest_are_in_no_error(tmp_path: Path) -> None:
    far = signed("https://server/ft").partition("#")[0]
    manifest = tmp_path / "manifest.yaml"
    for text, why in {
        f"runs: '{far}'": "got 'https://server/ft",
        f"runs: [{{path: '{far}'}}, {{path: '{far}'}}]": "several runs are called ft",
        f"runs: {{path: '{far}', [": "is not YAML: line 1: ",
    }.items():
        manifest.write_text(text)
        with pytest.raises(ManifestError, match=why) as caught:
            plan(manifest)
        assert "hidden" not in str(caught.value)
    with pytest.raises(ManifestError, match=r"called ft \(https://server/ft, https://other/ft\)"):
        plan([far, signed("https://other/ft")])


def test_secrets_of_the_base_that_adapters_name(tmp_path: Path) -> None:
    for name in ("one", "two"):
        far = signed(f"ftp://server/{name}")
        save_pico_adapter(tmp_path / name, base_model_name_or_path=far)
    with pytest.raises(LocationError, match="name ftp://server/one as their base") as caught:
        plan(tmp_path / "one")
    assert "hidden" not in str(caught.value)
    with pytest.raises(
        ManifestError, match=r"several bases \(ftp://server/one, ftp://server/two\)"
    ):
        plan([tmp_path / "one", tmp_path / "two"])


# --- A bucket -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[Counting, str]]:
    with s3_server() as server:
        yield server


@pytest.fixture
def bucket(
    s3: tuple[Counting, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[tuple[Counting, str]]:
    """An S3 bucket and a user who may read it."""
    import boto3

    counting, address = s3
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    name = f"b-{tmp_path.name.replace('_', '-')}"[:60].strip("-").lower()
    boto3.client("s3").create_bucket(Bucket=name)
    counting.served.clear()
    yield counting, name
    counting.faults.clear()


def upload(folder: Path, name: str, prefix: str) -> None:
    import boto3

    client = boto3.client("s3")
    for file in folder.rglob("*"):
        if file.is_file():
            client.upload_file(str(file), name, f"{prefix}/{file.relative_to(folder)}")


def test_a_name_that_no_bucket_can_have(bucket: tuple[Counting, str], base: Path) -> None:
    with pytest.raises(LocationError, match="bad name/x: no bucket can be called so; check its"):
        table("s3://bad name/x", base=base)


def test_runs_in_a_bucket(bucket: tuple[Counting, str], runs: dict[str, Path], base: Path) -> None:
    counting, name = bucket
    upload(base, name, "models/base")
    for method, folder in runs.items():
        upload(folder, name, f"runs/{method}")
    far = [f"s3://{name}/runs/{method}" for method in runs]
    counting.served.clear()
    expected = table(*runs.values(), base=base)
    told = plan(far, base=f"s3://{name}/models/base")
    assert len(told) == 10
    headers = dict(counting.served)
    counting.served.clear()
    same(table(*far, base=f"s3://{name}/models/base"), expected)
    served = sum(n for file, n in counting.served.items() if file.endswith(".safetensors"))
    assert served == sum(r.tensor_bytes + r.header_bytes for r in told)
    read_before = sum(n for file, n in headers.items() if file.endswith(".safetensors"))
    assert read_before == sum(r.header_bytes for r in told)
    chosen = 4 * chosen_bytes(pico_weights(), "query", "value") + sum(
        r.tensor_bytes for r in told if r.run in ("lora", "dora")
    )
    assert served <= 1.01 * chosen + read_before


@pytest.mark.parametrize("fault", ["503", "truncate"])
def test_a_bad_day_of_the_bucket(
    bucket: tuple[Counting, str], base: Path, tmp_path: Path, fault: str
) -> None:
    counting, name = bucket
    upload(base, name, "base")
    ft = save_model(tmp_path / "ft", moved(pico_weights(), 0.02, seed=1))
    told = plan(ft, base=f"s3://{name}/base", progress=False)[0]
    counting.served.clear()
    counting.faults = [fault] * 3
    same(table(ft, base=f"s3://{name}/base"), table(ft, base=base))
    assert counting.faults == []
    # Of a part that broke off, what came is fetched once more, but of no other.
    again = 3 * fetch.PART if fault == "truncate" else 0
    assert 0 <= counting.served[WEIGHTS] - told.tensor_bytes - told.header_bytes <= again


def test_a_file_of_the_bucket_that_changes_while_it_is_read(
    bucket: tuple[Counting, str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    from wda import opening

    _, name = bucket
    ft = save_model(tmp_path / "ft", moved(pico_weights(), 0.02, seed=1))
    upload(base, name, "base")
    place = locate(f"s3://{name}/base") / WEIGHTS
    whole = place.read(0, 500)  # type: ignore[attr-defined]
    assert whole == (base / WEIGHTS).read_bytes()[:500]
    pair = opening.pair

    def overwrite(*opened: object) -> object:
        paired = pair(*opened)  # type: ignore[arg-type]
        upload(ft, name, "base")  # as many bytes, all of the same names
        return paired

    monkeypatch.setattr(opening, "pair", overwrite)
    why = rf"s3://{name}/base/{WEIGHTS}: changed while it was read; compare again"
    with pytest.raises(LocationError, match=why):
        table(ft, base=f"s3://{name}/base")
    for known in (place, pickle.loads(pickle.dumps(place))):
        with pytest.raises(LocationError, match=why):
            known.read(8, 100)
    boto3.client("s3").delete_object(Bucket=name, Key=f"base/{WEIGHTS}")
    with pytest.raises(LocationError, match=r"safetensors: was deleted or written anew while it w"):
        place.read(8, 100)  # type: ignore[attr-defined]


def test_what_is_not_in_the_bucket(bucket: tuple[Counting, str], base: Path) -> None:
    _, name = bucket
    with pytest.raises(LocationError, match=rf"run 'ft': s3://{name}/runs/ft: no such file or"):
        table(f"s3://{name}/runs/ft", base=base)
    with pytest.raises(LocationError, match=r"s3://no-such-bucket/base: no such file or folder"):
        table(base, base="s3://no-such-bucket/base")
    upload(base, name, "base")
    file = f"s3://{name}/base/config.json"
    with pytest.raises(CheckpointError, match=rf"{file}: no checkpoint here; .* found a file"):
        table(base, base=file)


def test_without_credentials(bucket: tuple[Counting, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    done = CliRunner().invoke(app, ["compare", "s3://bucket/run"])
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    assert "s3://bucket/run: no credentials" in done.stderr
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in done.stderr


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_extra(scheme: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registered = importlib.import_module("fsspec.registry")._registry
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(registered, scheme, raising=False)
    with pytest.raises(
        MissingExtraError, match=rf"{scheme}://b/run: reading it needs {package}; .*\[remote\]"
    ):
        locate(f"{scheme}://b/run")
    with pytest.raises(LocationError, match=rf"expected {scheme}://BUCKET/PATH"):
        locate(f"{scheme}:///")


# --- A bucket of Google's, as far as it goes without one ----------------------------------------


@pytest.fixture
def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[FakeGoogle]:
    facts = {"buckets": tmp_path / "buckets", "served": Counter()}
    kind = type("OneFakeGoogle", (FakeGoogle,), facts)
    monkeypatch.setitem(importlib.import_module("fsspec.registry")._registry, "gs", kind)
    return kind


def test_runs_in_a_bucket_of_googles(
    google: type[FakeGoogle], runs: dict[str, Path], base: Path
) -> None:
    shutil.copytree(base, google.buckets / "b/models/base")
    for method, folder in runs.items():
        shutil.copytree(folder, google.buckets / "b/runs: 1" / method)  # no name for an address
    far = [f"gs://b/runs: 1/{method}" for method in runs]
    told = plan(far, base="gs://b/models/base", progress=False)
    google.served.clear()
    comparison = wda.compare(far, base="gs://b/models/base", cache=False, progress=False)
    same(comparison.table, table(*runs.values(), base=base))
    served = sum(n for name, n in google.served.items() if name.endswith(".safetensors"))
    assert served == sum(r.tensor_bytes + r.header_bytes for r in told)
    [file] = comparison.provenance["base"]["files"]  # type: ignore[index]
    generation = google().ls(f"b/models/base/{WEIGHTS}")[0]["generation"]
    assert file == {"file": WEIGHTS, "bytes": (base / WEIGHTS).stat().st_size, "mark": generation}
    for missing in ("gs://b/models/other", "gs://other/model"):
        with pytest.raises(LocationError, match=f"{missing}: no such file or folder"):
            table(base, base=missing)


def test_a_file_in_googles_bucket_that_changes_while_it_is_read(google: type[FakeGoogle]) -> None:
    folder = save_model(google.buckets / "b/base", pico_weights())
    place = locate("gs://b/base") / WEIGHTS
    assert place.read(0, 500) == (folder / WEIGHTS).read_bytes()[:500]  # type: ignore[attr-defined]
    save_model(folder, pico_weights(seed=1))
    with pytest.raises(
        LocationError, match=f"gs://b/base/{WEIGHTS}: was deleted or written anew while it was read"
    ):
        place.read(8, 100)  # type: ignore[attr-defined]


class HttpError(Exception):
    """As gcsfs raises for what it has no other kind of error for."""

    code = 401


class RefreshError(Exception):
    """As google.auth raises when a login is over."""


@pytest.mark.parametrize(
    "refusal", [OSError("Forbidden: b/b/o\nno access"), HttpError("no, 401"), RefreshError()]
)
def test_a_bucket_of_googles_that_may_not_be_read(
    google: type[FakeGoogle], refusal: Exception
) -> None:
    google.refusal = refusal
    done = CliRunner().invoke(app, ["compare", "gs://b/run"])
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "gs://b/run: no credentials, or none that may read it; run: gcloud auth" in done.stderr


# --- The Hub ------------------------------------------------------------------------------------


def test_a_hub_repository_is_read_in_parts(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    save_pico_adapter(tmp_path / "a")
    expected = table(tmp_path / "a", base=hub.folder)
    told = plan([tmp_path / "a"], base="hf://org/pico@v1")[0]
    hub.served.clear()
    comparison = wda.compare(tmp_path / "a", base="hf://org/pico@v1", progress=False)
    same(comparison.table, expected)
    chosen = chosen_bytes(pico_weights(), "query", "value")
    assert dict(hub.served) == {
        WEIGHTS: chosen + header_of(hub.folder / WEIGHTS),
        "config.json": (hub.folder / "config.json").stat().st_size,
    }
    assert told.tensor_bytes + told.header_bytes == hub.served[WEIGHTS]
    assert set(hub.authorized) == {"Bearer hf_secret"}
    assert comparison.provenance["base"] == {
        "location": "hf://org/pico@v1",
        "quantised": None,
        "files": [
            {
                "file": WEIGHTS,
                "bytes": (hub.folder / WEIGHTS).stat().st_size,
                "mark": hub.commit,
            }
        ],
    }


def test_a_run_on_the_hub(hub: type[Hub], base: Path, runs: dict[str, Path]) -> None:
    shutil.rmtree(hub.folder)
    shutil.copytree(runs["lora"], hub.folder)
    far = table("hf://org/pico", base=base)
    assert list(far["step"].unique()) == [9, 10, 100]
    same(far.drop(columns="run"), table(runs["lora"], base=base).drop(columns="run"))


def test_what_the_hub_gave_before_is_read_here(hub: type[Hub], tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    save_pico_adapter(tmp_path / "a")
    snapshot_download("org/pico", revision="v1")
    hub.served.clear()
    far = table(tmp_path / "a", base="hf://org/pico@v1")
    assert sum(hub.served.values()) == 0
    same(far, table(tmp_path / "a", base=hub.folder))


def test_what_the_hub_gave_before_does_when_it_is_away(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants, snapshot_download

    save_pico_adapter(tmp_path / "a")
    snapshot_download("org/pico", revision="v1")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    same(table(tmp_path / "a", base="hf://org/pico@v1"), table(tmp_path / "a", base=hub.folder))


def test_a_hub_name_that_does_not_exist(hub: type[Hub], base: Path) -> None:
    done = CliRunner().invoke(app, ["compare", str(base), "--base", "hf://org/other"])
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    assert "check the name and revision, or log in with: hf auth login" in done.stderr
    with pytest.raises(LocationError, match="expected hf://ORG/NAME or hf://ORG/NAME@REVISION"):
        locate("hf://pico")


@pytest.mark.parametrize("status", [401, 403])
def test_a_hub_that_asks_for_a_login(hub: type[Hub], base: Path, status: int) -> None:
    plain, login = hub.answer, "log in with: hf auth login"

    def refuse(part: str) -> None:
        def answer(server: Hub, body: bool) -> None:
            if part in server.path:
                server.send(status, b"", {"X-Error-Message": "Access is restricted."}, body)
            else:
                plain(server, body)

        hub.answer = answer

    for part, why in {
        "/api/models/": rf"hf://org/pico: .*{status}.*; check the name and revision, or {login}",
        "/resolve/": rf"hf://org/pico/{WEIGHTS}: HTTP {status} .*; {login}, and accept the repos",
    }.items():
        refuse(part)
        done = CliRunner().invoke(app, ["compare", str(base), "--base", "hf://org/pico"])
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
        assert re.search(why, done.stderr), done.stderr


def vanishing(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """Take a file away between its header and its tensors."""
    from wda import opening

    pair = opening.pair

    def pair_and_delete(*opened: object) -> object:
        paired = pair(*opened)  # type: ignore[arg-type]
        file.unlink()
        return paired

    monkeypatch.setattr(opening, "pair", pair_and_delete)


@pytest.mark.parametrize("location", ["hf://org/pico", "{address}"])
def test_a_file_that_vanishes(
    hub: type[Hub], base: Path, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Files, hub.folder) as (_, address):
        place = location.format(address=address)
        vanishing(monkeypatch, hub.folder / WEIGHTS)
        done = CliRunner().invoke(app, ["compare", str(base), "--base", place, "--no-cache"])
    assert done.exit_code == 1
    assert done.stderr == (
        f"wda: {place}/{WEIGHTS}: HTTP 404 Not Found; it is not there any more; compare again\n"
    )


# --- The command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "manifest",
    ["https://server/runs/manifest.yaml", "s3://bucket/manifest.yml", "pkg://wda/manifest.yaml"],
)
def test_a_manifest_must_lie_here(manifest: str) -> None:
    given = signed(manifest) if manifest.startswith("https") else manifest
    for more in ([], ["another"]):
        done = CliRunner().invoke(app, ["compare", given, *more, "--dry-run"])
        assert done.exit_code == 1
        assert done.stderr == (
            f"wda: {manifest}: a manifest is read from this machine only; download it and give "
            "its path (what it names may lie elsewhere)\n"
        )


def test_a_dry_run_tells_the_bytes_and_reads_no_tensor(
    site: tuple[type[Files], str], runs: dict[str, Path], base: Path
) -> None:
    handler, address = site
    shutil.copytree(base, handler.folder / "base")
    arguments = ["compare", str(runs["dora"]), "--base", f"{address}/base", "--dry-run"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert [(r["run"], r["step"], r["tensors"]) for r in told] == [
        ("base", None, 2 * PICO_LAYERS),
        ("dora", 9, 6 * PICO_LAYERS),
        ("dora", 10, 6 * PICO_LAYERS),
        ("dora", 100, 6 * PICO_LAYERS),
    ]
    assert told[0]["tensor_bytes"] == chosen_bytes(pico_weights(), "query", "value")
    assert handler.served[f"base/{WEIGHTS}"] == header_of(base / WEIGHTS)
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    total = sum(r["tensor_bytes"] for r in told)
    assert f"in sum {total:,} bytes of tensors" in shown.stdout
    assert "no tensor was read" in shown.stdout
