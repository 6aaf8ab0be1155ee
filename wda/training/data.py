"""Labelled texts → tokenised training and held-out sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
from transformers import PreTrainedTokenizerBase

from wda.errors import ManifestError, listing
from wda.training.recipe import DataSource


@dataclass(frozen=True)
class Splits:
    """Tokenised rows to train on and to test on, and the classes in order of their number."""

    train: datasets.Dataset
    held_out: datasets.Dataset
    classes: list[str]


def load_splits(
    source: DataSource, file: Path, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Splits:
    """Read a CSV file, choose its rows, split them with a fixed seed and tokenise them.

    Parameters
    ----------
    source : DataSource
        Columns, selection and split.
    file : Path
        The CSV file.
    tokenizer : PreTrainedTokenizerBase
        The model's own.
    max_length : int
        Tokens a text is cut to.

    Returns
    -------
    Splits
        Both parts have the same shares of the classes.

    Raises
    ------
    ManifestError
        When the file is no CSV, a column does not exist, or too few rows fit.
    """
    rows = datasets.Dataset.from_pandas(_chosen_rows(source, file), preserve_index=False)
    rows = rows.class_encode_column(source.label)
    parts = rows.train_test_split(
        test_size=source.held_out, seed=source.split_seed, stratify_by_column=source.label
    )

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = tokenizer(batch[source.text], truncation=True, max_length=max_length)
        return {**encoded, "labels": batch[source.label]}

    tokenised = parts.map(tokenize, batched=True, remove_columns=rows.column_names)
    classes = rows.features[source.label].names
    return Splits(tokenised["train"], tokenised["test"], classes)


def _chosen_rows(source: DataSource, file: Path) -> pd.DataFrame:
    try:
        frame = pd.read_csv(file, dtype=str, keep_default_na=False)
    except (ValueError, OSError) as error:
        raise ManifestError(f"data.location: {file}: is not a CSV file: {error}") from None
    absent = [c for c in (source.text, source.label, *source.where) if c not in frame]
    if absent:
        raise ManifestError(
            f"data: {file} has no columns {listing(absent)}; it has {listing(frame.columns)}"
        )
    for column, value in source.where.items():
        frame = frame[frame[column] == value]
    classes = frame[source.label].value_counts()
    if len(classes) < 2 or classes.min() < 2:
        raise ManifestError(
            f"data: {len(frame)} rows of {file} fit where={source.where}, with the classes "
            f"{listing(classes.index) or 'none'}; at least two rows of two classes are needed"
        )
    return frame[[source.text, source.label]]
