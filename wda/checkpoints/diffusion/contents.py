"""What trainers of image models store for a module, whichever way they spell its name.

Factors go by ``lora_down`` and ``lora_up``, ``lora_A`` and ``lora_B``, or older names; a kernel may
lie between them (``lora_mid``). LyCORIS adds Hadamard (``hada_``) and Kronecker products
(``lokr_``), differences (``diff``) and factors per feature (``weight`` beside ``on_input``). The
magnitude is ``dora_scale``, ``lora_magnitude_vector`` or ``magnitude``; what it has one number of
tells its shape: (out, 1, …) or (1, in, …), and one dimension is the output's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from wda.checkpoints.diffusion.cored import CoredFactors
from wda.checkpoints.factors import Names, sort_names
from wda.checkpoints.forms import Axis, Decomposed, Difference, Form, Stored
from wda.checkpoints.found import Found
from wda.checkpoints.products import Hadamard, Kronecker, Product
from wda.checkpoints.rotations import Scaled
from wda.errors import CheckpointError, listing
from wda.remote import at_once

_PRODUCTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_KRONECKER = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

# What a tensor is → how its name ends, after the module's path.
_ENDINGS = {
    "A": re.compile(
        r"\.(lora_A|lora_down|lora\.down|lora_linear_layer\.down)\.weight$|_lora\.down\.weight$"
    ),
    "B": re.compile(
        r"\.(lora_B|lora_up|lora\.up|lora_linear_layer\.up)\.weight$|_lora\.up\.weight$"
    ),
    "core": re.compile(r"\.lora_mid\.weight$"),
    "alpha": re.compile(r"\.alpha$"),
    "magnitude": re.compile(r"\.(dora_scale|lora_magnitude_vector(\.weight)?|magnitude)$"),
    "difference": re.compile(r"\.diff$"),
    "on_input": re.compile(r"\.on_input$"),
    "scales": re.compile(r"(?<!_norm)\.weight$"),
    **{kind: re.compile(rf"\.{kind}$") for kind in (*_PRODUCTS, *_KRONECKER)},
}

# Other methods of LyCORIS, some of whose tensors have the names of those above.
_REFUSED = {
    "GLoRA": re.compile(r"\.(a1|a2|b1|b2|bm)\.weight$"),
    "T-LoRA": re.compile(r"\.(lambda_layer|[pq]_layer\.weight)$"),
    "OFT": re.compile(r"\.(oft_blocks|oft_diag|oft_R\..*)$"),
}

_SIGN = re.compile(
    r"\.lora_(down|up|mid|A|B)\.weight$|[._]lora(_linear_layer)?\.(down|up)\.weight$"
    r"|\.(hada|lokr)_[wt][12]|\.(diff|diff_b|on_input|w_norm|oft_blocks|oft_diag|lambda_layer)$"
    r"|\.[ab]1\.weight$"
)


def is_adapters(name: str) -> bool:
    """Tell whether only adapters of such models have a tensor of this name."""
    return _SIGN.search(name) is not None


def module_of(name: str) -> str:
    """Give the module's path, which stands before such an ending."""
    return _SIGN.sub("", name)


def sort(found: Found) -> Names:
    """Sort the tensors, and refuse methods that are not read.

    Raises
    ------
    CheckpointError
        Naming them.
    """
    refused = [m for m, ending in _REFUSED.items() if any(map(ending.search, found.tensors))]
    if refused:
        raise CheckpointError(
            f"{found.path}: {listing(refused)} is not read; merge it with the library that "
            "trained it and compare the merged model"
        )
    return sort_names(found.path, found.tensors, _ENDINGS, prefix="")


def alphas(names: Names) -> dict[str, float]:
    """Read the α of every module that stores its own."""
    stored = names["alpha"]
    values = at_once(lambda name: float(names.tensors.read(name)), stored.values())
    return dict(zip(stored, values, strict=True))


def forms(
    found: Found, names: Names, scaling: Callable[[str, int], float], peft_wrote: bool = False
) -> dict[str, Form]:
    """Say which form each module has.

    Parameters
    ----------
    found : Found
        The adapter, and what the user says of it.
    names : Names
        Its tensors.
    scaling : callable
        Gives the factor s of a module of some rank.
    peft_wrote : bool
        Whether the magnitudes are known to be PEFT's, and so of output features.

    Raises
    ------
    CheckpointError
        When tensors do not fit each other or some are missing.
    """
    others: dict[str, Form] = {}
    for module in names["core"]:
        a, b = (_stored(names, kind, module) for kind in "AB")
        core = names.stored("core", module)
        others[module] = CoredFactors(a, b, scaling(module, a.shape[0]), core)
    for module in names["hada_w1_a"]:
        left = _product(names, module, "hada_w1_a", "hada_w1_b", "hada_t1")
        right = _product(names, module, "hada_w2_a", "hada_w2_b", "hada_t2")
        others[module] = Hadamard(left, right, scaling(module, left.factors[1].shape[0]))
    for module in sorted({*names["lokr_w1"], *names["lokr_w1_a"]}):
        others[module] = _kronecker(names, module, scaling)
    for module in names["difference"]:
        if len(names.tensors[names["difference"][module]].shape) > 1:
            others[module] = Difference(names.stored("difference", module))
    for module in names["on_input"]:
        on_input = bool(names.tensors.read(names["on_input"][module]))
        scales = _stored(names, "scales", module)
        others[module] = Scaled(scales, "input" if on_input else "output", from_one=True)
    alone = sorted(set(names["magnitude"]) - {*others, *names["A"]})
    if alone:
        raise CheckpointError(
            f"{found.path}: has magnitudes but no direction for {listing(alone, 4)}; save the "
            "adapter again with all its tensors"
        )
    return names.forms(
        lambda module: scaling(module, names.rank(module)),
        lambda module: _axis(found, names, module, peft_wrote),
        others,
    )


def accounted(names: Names) -> tuple[str, ...]:
    """Name the tensors that hold no numbers of a form's own: α and what factors are per."""
    return (*names["alpha"].values(), *names["on_input"].values())


def method(forms: Mapping[str, Form]) -> str:
    """Name how the adapter was trained, after the form that most modules have."""
    if any(isinstance(form, Decomposed) for form in forms.values()):
        return "dora"
    kinds = [_METHODS.get(type(form), "lora") for form in forms.values()]
    return max(sorted(set(kinds)), key=kinds.count, default="lora")


_METHODS: Mapping[type[Form], str] = {
    Hadamard: "loha",
    Kronecker: "lokr",
    Difference: "ft",
    Scaled: "ia3",
}


def _kronecker(names: Names, module: str, scaling: Callable[[str, int], float]) -> Form:
    left = ("lokr_w1",) if module in names["lokr_w1"] else ("lokr_w1_a", "lokr_w1_b")
    whole = module in names["lokr_w2"]
    right = ("lokr_w2",) if whole else ("lokr_w2_a", "lokr_w2_b", "lokr_t2")
    products = [_product(names, module, *kinds) for kinds in (left, right)]
    ranks = [of.factors[1].shape[0] for of in products if len(of.factors) > 1]
    # Without factors there is no rank to divide by, and LyCORIS takes s = 1.
    return Kronecker(products[0], products[1], scaling(module, ranks[0]) if ranks else 1.0)


def _product(names: Names, module: str, *kinds: str) -> Product:
    """Give the factors of one product; the core of a kernel may be absent."""
    present = [kind for kind in kinds if module in names[kind] or kind in kinds[:2]]
    return Product(tuple(_stored(names, kind, module) for kind in present))


def _stored(names: Names, kind: str, module: str) -> Stored:
    if module not in names[kind]:
        raise CheckpointError(
            f"{names.path}: {kind} is missing for {module}; all tensors of an adapter are needed; "
            "save it again, or copy it again"
        )
    return names.stored(kind, module)


def _axis(found: Found, names: Names, module: str, peft_wrote: bool) -> Axis:
    """Tell from a magnitude's shape what it has one number of."""
    if found.given.axis is not None:
        return found.given.axis
    name = names["magnitude"][module]
    shape = names.tensors[name].shape
    if len(shape) < 2 or (shape[0] > 1 and math.prod(shape[1:]) == 1) or peft_wrote:
        return "output"
    if len(shape) < 4 or "lora_magnitude_vector" not in name:
        return "input"
    # (1, n, 1, 1): of a convolution PEFT stores output channels so, and LyCORIS input channels.
    stored = (names.tensors[names[kind][module]].shape for kind in "BA" if module in names[kind])
    channels = [of[i] for i, of in enumerate(stored)]
    if channels[0] != channels[-1]:
        return "output" if shape[1] == channels[0] else "input"
    others = {names.tensors[of].shape for of in names["magnitude"].values()}
    axes: set[Axis] = {
        "output" if len(of) == 1 or of[0] > 1 else "input" for of in others if len(of) < 4
    }
    if len(axes) == 1:
        return axes.pop()
    raise CheckpointError(
        f"{found.path}: whether {name} has one number per output or per input channel its shape "
        f"{tuple(shape)} does not tell; say it with --axis output (PEFT's) or --axis input "
        "(converted from LyCORIS before 3.2 or OneTrainer)"
    )
