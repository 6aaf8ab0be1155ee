"""One sentence for every wrong field of a YAML file, with its line, all of them at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from wda.errors import WdaError
from wda.places import shown

Model = TypeVar("Model", bound=BaseModel)


def load_yaml(path: Path, model: type[Model], error: type[WdaError]) -> Model:
    """Read a YAML file into a typed model.

    Parameters
    ----------
    path : Path
        The file.
    model : type
        The pydantic model it has to fit.
    error : type
        Which of the family to raise.

    Returns
    -------
    model
        The validated content.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path}: cannot be read: {problem}") from None
    except yaml.YAMLError as problem:
        raise error(f"{path}: is not YAML: {_why(problem)}") from None
    if not isinstance(content, dict):
        raise error(f"{path}: expected fields ({', '.join(model.model_fields)}), found none")
    try:
        return model.model_validate(content)
    except ValidationError as problems:
        texts = [_sentence(node, dict(problem), model) for problem in problems.errors()]
        raise error(f"{path}: {len(texts)} wrong: " + "; ".join(texts)) from None


def _why(problem: yaml.YAMLError) -> str:
    """Say what is no YAML and where, but not what stands there: it may be a secret."""
    if isinstance(problem, yaml.MarkedYAMLError) and problem.problem_mark is not None:
        return f"line {problem.problem_mark.line + 1}: {problem.problem}"
    return " ".join(str(problem).split())


def _sentence(node: yaml.Node | None, problem: dict[str, Any], model: type[BaseModel]) -> str:
    where = tuple(problem["loc"])
    field = ".".join(str(part) for part in where) or "the whole"
    text = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        text = "no such field" + (
            f"; fields are {', '.join(model.model_fields)}" if len(where) == 1 else ""
        )
    elif problem["type"] != "missing":
        text += f", got {shown(repr(problem['input']))}"
    return f"line {_line(node, where)}: {field}: {text}"


def _line(node: yaml.Node | None, where: tuple[int | str, ...]) -> int:
    """Line of the deepest part of ``where`` that the file has."""
    line = node.start_mark.line if node else 0
    for part in where:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            if part >= len(node.value):
                break
            node = node.value[part]
            line = node.start_mark.line
        else:
            break
    return line + 1
