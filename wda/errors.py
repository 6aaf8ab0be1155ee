"""The family of errors a user can meet.

Every message is one line that says what came, where, what is allowed and what to do next; the
command line prints it without a traceback and exits with 1. Anything else that escapes is a bug.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class WdaError(Exception):
    """Something the user can mend; its text says what and how."""


class LocationError(WdaError):
    """A location that cannot be understood or does not exist."""


class CheckpointError(WdaError):
    """A checkpoint that cannot be read, or whose tensors cannot be right."""


class PairingError(WdaError):
    """Checkpoint and base do not fit together."""


class SelectionError(WdaError):
    """A choice of matrices that selects nothing."""


class ManifestError(WdaError):
    """A manifest or recipe with wrong fields.

    Parameters
    ----------
    message : str
        All of it in a line.
    problems : sequence of str
        Its sentences, where there are several.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems) or (message,)


class TableError(WdaError):
    """A saved table that lacks what is needed."""


class OutputError(WdaError):
    """A place that cannot be written to."""


class ConversionError(WdaError):
    """An adapter that a layout cannot express."""


class DeviceError(WdaError):
    """A device that is not there or cannot do the arithmetic."""


class ClusterError(WdaError):
    """Workers elsewhere that cannot be reached or cannot do the work."""


class ModelError(WdaError):
    """A model that cannot be measured or adapted in the state it is in."""


class TrainingError(WdaError):
    """A training that cannot go on."""


class MissingExtraError(WdaError):
    """A feature whose optional dependencies are not installed."""


def listing(names: Iterable[object], most: int = 12) -> str:
    """Join names for a message, cutting a long list but telling how long it is."""
    shown: Sequence[str] = [str(name) for name in names]
    if len(shown) <= most:
        return ", ".join(shown)
    return ", ".join(shown[:most]) + f", … ({len(shown)} in all)"


@contextmanager
def blaming(place: object) -> Iterator[None]:
    """Turn whatever a damaged file makes its reader stumble over into a message about the file.

    Readers check what they can name. A number where a list should be, or a tensor of another shape
    than its siblings', shows only when it is used.
    """
    try:
        yield
    except WdaError:
        raise
    except Exception as error:
        what = (str(error).strip().splitlines() or [""])[0][:200]
        raise CheckpointError(
            f"{place}: its reader stumbled ({type(error).__name__}: {what}); a file or a setting "
            "in it is damaged, copy it again; if it is whole, this is a defect worth reporting"
        ) from error
