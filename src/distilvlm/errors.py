"""Which errors a user reads as they are, and how damaged files become such errors. docs/errors.md lists all of them."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HOME = Path(__file__).parent
_RAISED = (ValueError, OSError, FileExistsError, FileNotFoundError, RuntimeError, ImportError)


def is_for_the_user(error: BaseException) -> bool:
    """Whether an error says what is wrong and what to do: a class of this package, or one of Python's that a `raise` of
    this package made. What Python itself makes of our code (`int("x")`) is a defect, and keeps its traceback."""
    if type(error).__module__.startswith(f"{__package__}."):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    raised_here = bool(frames) and Path(frames[-1].filename).is_relative_to(_HOME)
    return raised_here and type(error) in _RAISED and (frames[-1].line or "").startswith("raise ")


@contextmanager
def readable(place: str | Path) -> Iterator[None]:
    """Inside, files of `place` are read by others: what these raise for a damaged one (errors of JSON, safetensors,
    tokenizers, configurations; it can be anything) becomes a ValueError that names the place. Errors for the user pass.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if is_for_the_user(error):
            raise
        raise ValueError(
            f"{place} can't be read ({type(error).__name__}: {error}): is it whole? Copy or download it again"
        ) from error
