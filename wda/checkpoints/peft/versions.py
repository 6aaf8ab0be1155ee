"""What depends on the version of peft that wrote a configuration: how patterns match modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import chain
from typing import Any

from wda.checkpoints.found import CONFIG_FILE, Found
from wda.errors import CheckpointError

# The release 0.x since which a LoraConfig has a field, and writes it whatever it holds.
_SINCE = {
    "layer_replication": 10,
    "lora_bias": 14,
    "trainable_token_indices": 15,
    "target_parameters": 17,
    "peft_version": 18,
}
# A file with this field was written by peft itself, so what is absent did not exist yet.
_OWN_FIELD = "megatron_core"
_LAST = 10**6


def written_by(config: Mapping[str, Any]) -> range:
    """Tell which releases 0.x of peft may have written a configuration.

    Examples
    --------
    >>> written_by({"peft_version": "0.18.1.dev0"})
    range(18, 19)
    >>> written_by({"megatron_core": None, "layer_replication": None})
    range(10, 14)
    """
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    if version is not None:
        minor = int(version.group(2)) if version.group(1) == "0" else _LAST - 1
        return range(minor, minor + 1)
    if _OWN_FIELD not in config:
        return range(_LAST)
    first = max((since for field, since in _SINCE.items() if field in config), default=0)
    last = min((since for field, since in _SINCE.items() if field not in config), default=_LAST)
    return range(first, last)


def rank_and_alpha(found: Found, module: str, rank: int | None = None) -> tuple[int, float]:
    """Look a module's rank and α up in a configuration as the version that wrote it does.

    Parameters
    ----------
    found : Found
        The adapter, with ``rank_pattern`` and ``alpha_pattern`` in its configuration.
    module : str
        The module's path.
    rank : int, optional
        The rank of its factors in the file, which tells some of the versions apart.

    Raises
    ------
    CheckpointError
        When versions disagree and nothing tells which one it was.
    """
    releases = written_by(found.config)
    answers = {
        name: look_up(found.config, module)
        for name, since, look_up in _MATCHING
        if max(since.start, releases.start) < min(since.stop, releases.stop)
    }
    fitting = {name: of for name, of in answers.items() if of[0] == rank} or answers
    if len(set(fitting.values())) > 1:
        choices = ", ".join(f"α = {alpha:g} {name}" for name, (_, alpha) in fitting.items())
        raise CheckpointError(
            f"{found.path}: how rank_pattern and alpha_pattern match {module} depends on the "
            f"version of peft: {choices}; add the one that trained it to {CONFIG_FILE}, as in "
            '"peft_version": "0.15.0"'
        )
    return next(iter(fitting.values()))


def _together(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    key = _first(r".*\.{}$", chain(ranks, alphas), module)
    return ranks.get(key, config["r"]), alphas.get(key, _alpha(config))


def _apart(pattern: str, config: Mapping[str, Any], module: str) -> tuple[int, float]:
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(_first(pattern, ranks, module), config["r"])
    return rank, alphas.get(_first(pattern, alphas, module), _alpha(config))


def _alpha(config: Mapping[str, Any]) -> float:
    return float(config["lora_alpha" if "lora_alpha" in config else "alpha"])


def _first(pattern: str, keys: Iterable[str], module: str) -> str:
    return next((key for key in keys if re.match(pattern.format(key), module)), module)


# Up to 0.13 the first key that fits, of ranks or of alphas, counted for both; since 0.14 each has
# its own, and since 0.15 a key may be the whole name.
_MATCHING = (
    ("up to 0.13", range(14), _together),
    ("in 0.14", range(14, 15), partial(_apart, r".*\.{}$")),
    ("since 0.15", range(15, _LAST), partial(_apart, r"(.*\.)?({})$")),
)
