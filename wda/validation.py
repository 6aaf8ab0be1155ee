"""One sentence for every wrong field of a YAML file, with its line, all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from wda.errors import WdaError
from wda.places import shown

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Document:
    """A YAML file: what it says, and where in it.

    Attributes
    ----------
    path : Path
        The file.
    content : dict
        Its fields.
    """

    path: Path
    content: dict[str, Any]
    _node: yaml.Node | None

    def validate(self, model: type[Model], error: type[WdaError]) -> Model:
        """Give the content as a typed model; raise ``error`` with every problem in it."""
        try:
            return model.model_validate(self.content)
        except ValidationError as problems:
            raise error(self.all_wrong(self.sentences(problems, model))) from None

    def sentences(self, problems: ValidationError, model: type[BaseModel]) -> list[str]:
        """Give one sentence for each wrong field, with its line."""
        return [
            f"line {self.line(problem['loc'])}: {_sentence(dict(problem), model)}"
            for problem in problems.errors()
        ]

    def all_wrong(self, sentences: Sequence[str]) -> str:
        """Put sentences about the file into one line."""
        return f"{self.path}: {len(sentences)} wrong: " + "; ".join(sentences)

    def line(self, where: Sequence[int | str]) -> int:
        """Give the line of the deepest part of ``where`` that the file has."""
        return _line(self._node, where)


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
    return read_yaml(path, list(model.model_fields), error).validate(model, error)


def read_yaml(path: Path, fields: Sequence[str], error: type[WdaError]) -> Document:
    """Read a YAML file of some fields, which are named where it has none.

    Raises
    ------
    error
        When it cannot be read, or is not YAML.
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
        raise error(f"{path}: expected fields ({', '.join(fields)}), found none")
    return Document(path, content, node)


def _why(problem: yaml.YAMLError) -> str:
    """Say what is no YAML and where, but not what stands there: it may be a secret."""
    if isinstance(problem, yaml.MarkedYAMLError) and problem.problem_mark is not None:
        return f"line {problem.problem_mark.line + 1}: {problem.problem}"
    return " ".join(str(problem).split())


def _sentence(problem: dict[str, Any], model: type[BaseModel]) -> str:
    where = tuple(problem["loc"])
    field = ".".join(str(part) for part in where) or "the whole"
    text = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        text = "no such field" + (
            f"; fields are {', '.join(model.model_fields)}" if len(where) == 1 else ""
        )
    elif problem["type"] != "missing":
        text += f", got {shown(repr(problem['input']))}"
    return f"{field}: {text}"


def _line(node: yaml.Node | None, where: Sequence[int | str]) -> int:
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
