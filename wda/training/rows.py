"""Where data lie → rows to train on and rows held out, by the datasets library."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import datasets

from wda.errors import LocationError, ManifestError, WdaError, listing
from wda.locations import resolve
from wda.training.recipe import DataSource

_HUB = re.compile(r"^hf://datasets/([^@]+)(?:@(.+))?$")
_WEB = re.compile(r"^https?://")

# A file's ending → datasets' name of its format.
_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_rows(
    source: DataSource,
    prepare: Callable[[datasets.Dataset], datasets.Dataset],
    stratify: str | None = None,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Read the rows of a source, choose those that are wanted and hold some out.

    Parameters
    ----------
    source : DataSource
        Location, selection and split.
    prepare : callable
        Makes of the chosen rows what is to be split.
    stratify : str or None
        The column of whose values both parts shall have the same shares.

    Returns
    -------
    train, held_out : Dataset
        Neither is empty.

    Raises
    ------
    ManifestError
        When the data cannot be read, a column of ``where`` does not exist, or too few rows fit.
    """
    rows = _chosen(_read(source.location, source.config, source.split), source)
    _enough(rows, source, 2)
    rows = prepare(rows)
    if isinstance(source.held_out, str):
        train, held_out = rows, prepare(_chosen(_held_out(source, source.held_out), source))
    else:
        parts = rows.train_test_split(
            test_size=source.held_out, seed=source.split_seed, stratify_by_column=stratify
        )
        train, held_out = parts["train"], parts["test"]
    if source.samples is not None:
        _enough(train, source, source.samples)
        train = train.shuffle(seed=source.split_seed).select(range(source.samples))
    _enough(train, source, 1)
    _enough(held_out, source, 1)
    return train, held_out


def require_columns(there: Sequence[str], columns: Sequence[str], location: str) -> None:
    """Refuse data without some columns.

    Raises
    ------
    ManifestError
        Naming those that exist, and the nearest to what was asked for.
    """
    absent = [column for column in columns if column not in there]
    if absent:
        near = get_close_matches(absent[0], there, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ManifestError(
            f"data: {location} has no columns {listing(absent)}; it has {listing(there)}{hint}"
        )


def is_elsewhere(source: DataSource) -> bool:
    """Tell whether rows have to be fetched before they can be read."""
    return _HUB.match(source.location) is not None or _WEB.match(source.location) is not None


def columns_elsewhere(source: DataSource) -> list[str]:
    """Read the names of the columns of data elsewhere from their beginning alone.

    Raises
    ------
    ManifestError
        When they cannot be read.
    """
    rows = _read(source.location, source.config, source.split, streaming=True)
    try:
        return list(rows.column_names or next(iter(rows)))
    except Exception as error:  # what streams raises what its readers raise
        raise _unreadable(source.location, error) from None


def fingerprinted(source: DataSource) -> list[Path]:
    """Name the files on this machine that the rows come from, for the provenance."""
    if is_elsewhere(source):
        return []
    path = resolve(source.location)
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def _read(location: str, config: str | None, split: str, streaming: bool = False) -> Any:
    try:
        return _loaded(location, config, split, streaming)
    except WdaError:
        raise
    except Exception as error:  # datasets raises what its readers raise
        raise _unreadable(location, error) from None


def _unreadable(location: str, error: Exception) -> ManifestError:
    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ManifestError(f"data.location: {location}: cannot be read as a table: {why}")


def _loaded(location: str, config: str | None, split: str, streaming: bool) -> Any:
    if hub := _HUB.match(location):
        return datasets.load_dataset(
            hub[1], config, split=split, revision=hub[2], streaming=streaming
        )
    if _WEB.match(location):
        form = _format_of(PurePosixPath(location), location)
        return datasets.load_dataset(
            form, data_files=location, split="train", streaming=streaming, **_options(form)
        )
    path = resolve(location)
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _of_split(datasets.load_from_disk(str(path)), split, location)
        return datasets.load_dataset(str(path), config, split=split)
    form = _format_of(path, location)
    return datasets.load_dataset(form, data_files=str(path), split="train", **_options(form))


def _format_of(path: PurePath, location: str) -> str:
    if path.suffix not in _FORMATS:
        raise LocationError(
            f"data.location: {location} ends in {path.suffix or 'nothing'}; files in "
            f"{listing(_FORMATS)} are read"
        )
    return _FORMATS[path.suffix]


def _options(form: str) -> dict[str, Any]:
    """Keep texts such as NA as they are written."""
    return {"keep_default_na": False} if form == "csv" else {}


def _of_split(found: Any, split: str, location: str) -> datasets.Dataset:
    if isinstance(found, datasets.Dataset):
        return found
    if split not in found:
        raise ManifestError(
            f"data.split: {location} has no split {split!r}; it has {listing(found)}"
        )
    return found[split]


def _held_out(source: DataSource, wanted: str) -> datasets.Dataset:
    """Read another split of the same dataset, or another file."""
    if _HUB.match(source.location) or (
        not _WEB.match(source.location) and resolve(source.location).is_dir()
    ):
        return _read(source.location, source.config, wanted)
    return _read(wanted, None, source.split)


def _chosen(rows: datasets.Dataset, source: DataSource) -> datasets.Dataset:
    require_columns(rows.column_names, list(source.where), source.location)
    for column, value in source.where.items():
        fits = [str(found) == value for found in rows[column]]
        rows = rows.select([i for i, fit in enumerate(fits) if fit])
    return rows


def _enough(rows: datasets.Dataset, source: DataSource, least: int) -> None:
    if len(rows) < least:
        raise ManifestError(
            f"data: {len(rows)} rows of {source.location} fit where={source.where} and "
            f"samples={source.samples}; at least {least} are needed"
        )
