"""How adapters name the modules of a pipeline's parts, and what those are called in a base.

Adapters put a word for the part in front, and many write ``_`` for the dots of a module's path, so
that only the base's own names tell where the dots were.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from wda.errors import PairingError, listing

# The word in front → the part in a pipeline's folder, or in one file of all parts as the
# models' authors publish them. A word that is none of these means the model that is trained.
_PARTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "unet": ("unet", "transformer", "model.diffusion_model"),
        "transformer": ("transformer", "model.diffusion_model"),
        "transformer_2": ("transformer_2",),
        "prior": ("prior",),
        "text_encoder": (
            "text_encoder",
            "conditioner.embedders.0.transformer",
            "cond_stage_model.transformer",
        ),
        "text_encoder_2": ("text_encoder_2",),
        "text_encoder_3": ("text_encoder_3",),
    }
)
_WORDS: Mapping[str, str] = MappingProxyType(
    {
        **{part: part for part in _PARTS},
        "lora_unet": "unet",
        "lora_transformer": "transformer",
        "lora_prior_unet": "prior",
        "diffusion_model": "unet",
        "lora_te": "text_encoder",
        "lora_te1": "text_encoder",
        "lora_te2": "text_encoder_2",
        "lora_te3": "text_encoder_3",
        "lycoris": "unet",
    }
)

# Words that only one of the two spellings of a UNet has.
_ORIGINAL = re.compile(r"(^|[._])(input_blocks|output_blocks|middle_block)[._]")
_DIFFUSERS = re.compile(r"(^|[._])(down_blocks|up_blocks|mid_block)[._]")


def split_word(module: str) -> tuple[str, str]:
    """Split an adapter's name of a module into the word for its part and the path in there.

    Examples
    --------
    >>> split_word("lora_te1_text_model_encoder_layers_0_mlp_fc1")
    ('lora_te1', 'text_model_encoder_layers_0_mlp_fc1')
    >>> split_word("text_encoder_2.encoder.layers.0.mlp.fc1")
    ('text_encoder_2', 'encoder.layers.0.mlp.fc1')
    """
    for word in sorted(_WORDS, key=len, reverse=True):
        if module.startswith((f"{word}.", f"{word}_")):
            return word, module[len(word) + 1 :]
    return "", module


def names_in_base(modules: Iterable[str], base_modules: Iterable[str]) -> dict[str, str]:
    """Give the base's name of every module, by the adapter's; what the base lacks keeps its own.

    Raises
    ------
    PairingError
        When no name is common to both, or two modules get the same.
    """
    ours, theirs = sorted(modules), frozenset(base_modules)
    tables: dict[str, dict[str, str]] = {}
    names: dict[str, str] = {}
    for module in ours:
        word, path = split_word(module)
        if word not in tables:
            tables[word] = _table(word, theirs)
        names[module] = tables[word].get(_flat(_as_today(path)), module)
    known = {module: name for module, name in names.items() if name in theirs}
    if not known:
        raise PairingError(_why_nothing_fits(ours, theirs))
    if len(set(known.values())) < len(known):
        first = {name: module for module, name in known.items()}
        twice = [m for m, name in known.items() if first[name] != m]
        raise PairingError(
            f"{listing(twice, 3)} and {listing((first[known[m]] for m in twice), 3)} get the same "
            "names in the base; give the folder of the whole pipeline as base, where the parts "
            "have names of their own"
        )
    return names


def _table(word: str, base_modules: frozenset[str]) -> dict[str, str]:
    """Give the flat path of every module in the part that a word means → the base's name."""
    roots = [f"{root}." for root in _PARTS[_WORDS.get(word, "unet")]]
    # A base that has no such part is one model, whose names need no word in front.
    root = next((r for r in roots if any(m.startswith(r) for m in base_modules)), "")
    paths = {m.removeprefix(root): m for m in base_modules if m.startswith(root)}
    # A text encoder's layers lie one module deeper in some releases of transformers.
    deeper = {f"text_model.{path}": module for path, module in paths.items()}
    flatter = {path.removeprefix("text_model."): module for path, module in paths.items()}
    whole = {module: module for module in base_modules}
    return _flattened(whole) | _flattened(deeper) | _flattened(flatter) | _flattened(paths)


def _flattened(names: Mapping[str, str]) -> dict[str, str]:
    """Write ``_`` for the dots, leaving out what is then no longer told apart."""
    counts = Counter(map(_flat, names))
    return {_flat(path): module for path, module in names.items() if counts[_flat(path)] == 1}


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _as_today(path: str) -> str:
    """Spell what attention processors held as the modules that they belonged to."""
    attention, processor, module = path.partition(".processor.")
    if not processor:
        return path
    return f"{attention}.{'to_out.0' if module == 'to_out' else module}"


def _why_nothing_fits(ours: list[str], theirs: frozenset[str]) -> str:
    samples = f"the adapter has {listing(ours, 3)}; the base has {listing(sorted(theirs), 3)}"

    def spelled(pattern: re.Pattern[str], names: Iterable[str]) -> bool:
        return any(map(pattern.search, names))

    if spelled(_ORIGINAL, ours) and spelled(_DIFFUSERS, theirs):
        return (
            "the adapter names modules as the model's authors do (input_blocks), the base as "
            f"diffusers does (down_blocks); give the authors' one file as base; {samples}"
        )
    if spelled(_DIFFUSERS, ours) and spelled(_ORIGINAL, theirs):
        return (
            "the adapter names modules as diffusers does (down_blocks), the base as its authors do "
            f"(input_blocks); give the pipeline's folder of diffusers as base; {samples}"
        )
    return (
        "no module of the adapter has a name that exists in the base, whose dots it may write as "
        f"_; {samples}; is this the model it was trained on?"
    )
