r"""The algebra of an update: what turns W0 into Wt, without forming a product it can avoid.

An update knows how every row of W0 moves (:class:`~wda.decomposition.Displacement`). It can be
cut into blocks of rows, so that W0 streams past all updates once, and transposed, so that
``per="input"`` is the same computation on the transposed matrices.

=========================  ===================================  =============================
class                      Wt                                   cost of a row's displacement
=========================  ===================================  =============================
:class:`Dense`             the stored matrix                    O(in)
:class:`LowRank`           W0 + s·B·A                           O(in·r), B·A is never formed
:class:`WeightDecomposed`  m ⊙ V/‖V‖ with V = W0 + s·B·A        the same
:class:`ColumnScaled`      (W0 + s·B·A) ⊙ κ, κ per column       the same, twice
:class:`RowScaled`         κ ⊙ (W0 + s·B·A), κ per row          the same
:class:`Computed`          W0 + δ                               what it costs to form δ
=========================  ===================================  =============================
"""

from __future__ import annotations

from wda.updates.dense import Computed, Dense
from wda.updates.low_rank import LowRank, inner_products
from wda.updates.update import RowUpdate, Some, Update, merged
from wda.updates.weight_decomposed import (
    ColumnScaled,
    RowScaled,
    WeightDecomposed,
    column_scale,
    column_scaled,
)

__all__ = [
    "ColumnScaled",
    "Computed",
    "Dense",
    "LowRank",
    "RowScaled",
    "RowUpdate",
    "Some",
    "Update",
    "WeightDecomposed",
    "column_scale",
    "column_scaled",
    "inner_products",
    "merged",
]
