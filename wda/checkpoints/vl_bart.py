"""DoRA as the paper's code for images and videos writes it: whole models of VL-BART and VL-T5.

A layer's names are ``weight_v`` (out, in), which is W0, ``weight_m`` (out, 1), ``lora_A``
(rank, in) and ``lora_B`` (out, rank). B·A is added as it is, whatever α is.
"""

from __future__ import annotations

import re
from typing import Self

from wda.checkpoints.adapter import Adapter
from wda.checkpoints.factors import sort_names
from wda.checkpoints.found import Found
from wda.checkpoints.rebased import StoredStart, started_from
from wda.errors import CheckpointError, listing

_START = re.compile(r"\.weight_v$")
_ENDINGS = {
    "A": re.compile(r"\.lora_A$"),
    "B": re.compile(r"\.lora_B$"),
    "magnitude": re.compile(r"\.weight_m$"),
    "start": _START,
    "whole": re.compile(r"\.weight$"),
}


class VlBartCheckpoint(Adapter):
    """A ``BEST.pth`` or ``LAST.pth`` of the paper's image and video understanding."""

    layout = "DoRA model of the paper's image and video code"
    evidence = "names ending in weight_m, weight_v and lora_A"

    @classmethod
    def open(cls, found: Found) -> Self | None:
        """Open a file with names of these layers."""
        ends = ("A", "magnitude", "start")
        if not all(any(map(_ENDINGS[kind].search, found.tensors)) for kind in ends):
            return None
        names = sort_names(found.path, found.tensors, _ENDINGS, prefix="")
        forms = names.forms(lambda _module: 1.0)
        names.require_magnitudes(names["A"], "weight_m is missing", "save the whole model again")
        lost = sorted((set(names["A"]) | set(names["magnitude"])) - set(names["start"]))
        if lost:
            raise CheckpointError(
                f"{found.file}: weight_v, W0 itself, is missing for {listing(lost, 4)}; save the "
                "whole model again"
            )
        for module in names["A"]:
            forms[module] = started_from(StoredStart(names.stored("start", module)), forms[module])
        return cls(found, found.tensors, forms, "dora", names.frozen)
