"""Folders of class names, as torchvision's ImageFolder and Keras read them: ROOT/CLASS/picture.jpg."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from distilvlm.data.convert.absent import Negatives
from distilvlm.data.convert.asking import DRAWN, Asking
from distilvlm.data.convert.boxes import Boxed
from distilvlm.data.convert.items import Fault, Item, Reading, asked, filled
from distilvlm.data.convert.pictures import is_picture
from distilvlm.data.problems import DataError

QUESTION = "What is this?"


CLASS = "class"


def read(
    source: Path,
    images: Path | None = None,
    *,
    question: str = QUESTION,
    answer: str = "{label}",
    pretty: bool = False,
    task: str = CLASS,
    negatives: Negatives = "random",
    rated: bool = False,
) -> Reading:
    """One row per picture: its class is the answer. Pictures are named from `source` (or from `images` above it).

    Args:
        source: the directory that holds one directory per class; what lies deeper belongs to the class, too.
        question: what is asked, with {label} if wanted; "" asks nothing (a caption, for the template `plain`).
        answer: e.g. "a photo of a {label}".
        pretty: `_` and `-` of a class name become spaces.
        task: "class"; or "presence" and "pairs", which take a picture for one that shows a thing of its class and
            nothing else. They have the question, negatives and rated of `asking.Asking`, and no answer.

    Raises:
        DataError: no such directory or task, or no class folder with a picture in it.
    """
    root = (images or source).absolute()
    classes = _classes(source, root)
    left_out: Counter[str] = Counter()
    if task != CLASS:
        if task not in DRAWN or answer != "{label}":
            raise DataError(f"task: {CLASS}, {' or '.join(DRAWN)}, of which only {CLASS} takes an answer")
        asking = Asking(task, None if question == QUESTION else question, negatives=negatives, rated=rated)
        shown = list(_shown(classes, root, pretty))
        names = list(dict.fromkeys(label for boxed in shown for label in boxed.counts))
        return Reading(root, asking.items(shown, names, left_out), left_out)

    def items() -> Iterator[Item | Fault]:
        for directory in classes:
            label = _label(directory, pretty)
            files = sorted(path for path in directory.rglob("*") if path.is_file() and not path.name.startswith("."))
            for path in files:
                if not is_picture(path):
                    left_out[f"files that are no pictures ({path.suffix or 'no suffix'})"] += 1
                    continue
                name = path.absolute().relative_to(root).as_posix()
                values = {"label": label}
                meta = {"class": directory.name}
                turns = asked(filled(question, values, "question"), filled(answer, values, "answer"))
                yield Item(str(path), None, name, (name,), turns, meta, meta)
            if not any(is_picture(path) for path in files):
                yield Fault(str(directory), None, "class", "no picture in this class: add some, or remove the folder")

    return Reading(root, items(), left_out)


def _label(directory: Path, pretty: bool) -> str:
    return directory.name.replace("_", " ").replace("-", " ") if pretty else directory.name


def _shown(classes: list[Path], root: Path, pretty: bool) -> Iterator[Boxed]:
    """Every picture, as one whose class covers it."""
    for directory in classes:
        for path in sorted(directory.rglob("*")):
            if path.is_file() and is_picture(path):
                name = path.absolute().relative_to(root).as_posix()
                yield Boxed(str(path), name, (1, 1), ((_label(directory, pretty), (0.0, 0.0, 1.0, 1.0)),))


def _classes(source: Path, root: Path) -> list[Path]:
    if not source.is_dir():
        raise DataError(f"no directory {source}: name the one that holds a folder per class")
    if not source.absolute().is_relative_to(root):
        raise DataError(f"images: {root} does not hold {source}: pictures are named from it; leave it out")
    classes = sorted(entry for entry in source.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise DataError(f"{source} holds no folder: one per class is expected, {source / 'CLASS' / 'picture.jpg'}")
    if all(not any(is_picture(path) for path in entry.iterdir()) for entry in classes):
        inner = next((path for entry in classes for path in sorted(entry.iterdir()) if path.is_dir()), None)
        if inner is not None:
            raise DataError(f"no picture lies directly in a folder of {source}: convert {inner.parent} by itself?")
    return classes
