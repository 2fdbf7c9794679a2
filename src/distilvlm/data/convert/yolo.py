"""YOLO data sets: a YAML file with `path`, `train`, `val` and `names`, and a label file per picture."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from distilvlm.data.boxes import Box
from distilvlm.data.convert.absent import Negatives
from distilvlm.data.convert.asking import Asking
from distilvlm.data.convert.boxes import Boxed, checked
from distilvlm.data.convert.items import Fault, Item, Reading
from distilvlm.data.convert.pictures import is_picture
from distilvlm.data.geometry import PictureError, upright_size
from distilvlm.data.problems import DataError


def read(
    source: Path,
    images: Path | None = None,
    *,
    split: str = "train",
    task: str = "detect",
    question: str | None = None,
    absent: int = 0,
    decimals: int = 2,
    negatives: Negatives = "random",
    rated: bool = False,
) -> Reading:
    """Rows about the boxes of one split; see `asking.Asking` for what is asked of them.

    A picture .../images/a/b.jpg has its objects in .../labels/a/b.txt, a line each: class, then centre x, centre y,
    width and height as shares of the picture (or the corners of a polygon, whose box is taken). A picture without such
    a file is one without objects.

    Args:
        source: the data set's YAML file.
        images: the data set's directory where the YAML's `path` does not lead to it.
        split: key of the YAML: train, val, test; or several, "train,val".

    Raises:
        DataError: the YAML can't be used, or no picture of the split has a label file.
    """
    asking = Asking(task, question, absent, decimals, negatives, rated)
    config = _config(source)
    names = _names(config, source)
    root = _root(config, source, images)
    splits = dict.fromkeys(name.strip() for name in split.split(","))
    files = list(dict.fromkeys(file for name in splits for file in _pictures(config, source, root, name)))
    labels = {file: _label_file(file, source) for file in files}
    if not any(label.is_file() for label in labels.values()):
        raise DataError(f"{source}: no picture of '{split}' has a label file; {labels[files[0]]} was looked for first")
    left_out: Counter[str] = Counter()

    def items() -> Iterator[Item | Fault]:
        pictures: list[Boxed] = []
        for file, label in labels.items():
            if not label.is_file() and not absent:
                left_out["pictures without a label file"] += 1
                continue
            boxed, faults = _boxed(file, label, root, names)
            yield from faults
            if boxed is not None and not faults:
                pictures.append(boxed)
        known = set(labels.values())
        strangers = {entry for folder in {label.parent for label in known} for entry in folder.glob("*.txt")} - known
        if strangers:
            left_out["label files without a picture"] += len(strangers)
        yield from asking.items(pictures, list(names.values()), left_out)

    return Reading(root, items(), left_out, rated)


def _boxed(file: Path, label: Path, root: Path, names: Mapping[int, str]) -> tuple[Boxed | None, list[Fault]]:
    try:
        size = upright_size(str(file))
    except PictureError as error:
        return None, [Fault(str(file), None, "image", f"{error}; put a whole picture there")]
    things: list[tuple[int, str, Box]] = []
    faults: list[Fault] = []
    lines = label.read_text(encoding="utf-8", errors="replace").splitlines() if label.is_file() else []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            kind, box = _parsed(line, size)
        except ValueError as error:
            faults.append(Fault(str(label), number, "line", f"{line.strip()[:60]!r}: {error}"))
            continue
        if kind not in names:
            reason = f"{kind} is none of the {len(names)} in `names` of the YAML file: mend the line, or add the name"
            faults.append(Fault(str(label), number, "class", reason))
            continue
        things.append((number, names[kind], box))
    boxed, bad = checked(str(label), os.path.relpath(file, root), size, things)
    return boxed, [*faults, *bad]


def _parsed(line: str, size: tuple[int, int]) -> tuple[int, Box]:
    """Class and box in pixels of one line. Raises `ValueError` with what is expected."""
    first, *rest = line.split()
    try:
        kind, values = float(first), [float(value) for value in rest]
    except ValueError:
        raise ValueError("numbers are expected: class, centre x, centre y, width, height") from None
    if not kind.is_integer():
        raise ValueError("the class, which comes first, is a whole number")
    width, height = size
    if len(values) == 4:
        x, y, w, h = values
        return int(kind), ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
    if len(values) >= 6 and len(values) % 2 == 0:  # a polygon, or the corners of a turned box
        xs, ys = values[::2], values[1::2]
        return int(kind), (min(xs) * width, min(ys) * height, max(xs) * width, max(ys) * height)
    raise ValueError(f"{len(values)} numbers behind the class; 4 are expected: centre x, centre y, width, height")


def _config(source: Path) -> dict[str, Any]:
    if source.is_dir():
        found = sorted([*source.glob("*.yaml"), *source.glob("*.yml")])
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(f"{source} is a directory: name the data set's YAML file (there is {names})")
    try:
        config = yaml.safe_load(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"no file {source}: name the data set's YAML file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{source} can't be read as YAML: {error}") from None
    if not isinstance(config, dict):
        raise DataError(f"{source}: a mapping with train, val and names is expected")
    return config


def _names(config: Mapping[str, Any], source: Path) -> dict[int, str]:
    names = config.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names or not all(isinstance(key, int) for key in names):
        raise DataError(f"{source}: `names` must list the classes, or map their numbers to names")
    return {number: str(name) for number, name in names.items()}


def _root(config: Mapping[str, Any], source: Path, images: Path | None) -> Path:
    root = images if images is not None else source.parent / str(config.get("path") or ".")
    root = Path(os.path.normpath(root.absolute()))
    if not root.is_dir():
        raise DataError(f"{source}: `path` leads to {root}, which is no directory; say where the data set is (images)")
    return root


def _pictures(config: Mapping[str, Any], source: Path, root: Path, split: str) -> list[Path]:
    given = config.get(split)
    if not given:
        there = ", ".join(key for key in ("train", "val", "test") if config.get(key)) or "none"
        raise DataError(f"{source} has no split '{split}'; there is {there}")
    found: list[Path] = []
    for entry in given if isinstance(given, list) else [given]:
        place = root / str(entry)
        if place.is_dir():
            found.extend(sorted(path for path in place.rglob("*") if is_picture(path)))
        elif place.is_file():
            lines = place.read_text(encoding="utf-8").splitlines()
            named = (line.strip() for line in lines if line.strip())
            # As Ultralytics reads them: `./` is the list's own folder, everything else starts from the data set's.
            found.extend(Path(os.path.normpath((place.parent if n.startswith("./") else root) / n)) for n in named)
        else:
            raise DataError(f"{source}: '{split}' names {place}, which is not there")
    if not found:
        raise DataError(f"{source}: no picture in '{split}' ({given})")
    return found


def _label_file(picture: Path, source: Path) -> Path:
    """`images` → `labels` in the path, where it comes last; the suffix → .txt."""
    before, middle, after = str(picture).rpartition(f"{os.sep}images{os.sep}")
    if not middle:
        raise DataError(f"{source}: {picture} lies in no folder `images`, so its label file in `labels` is not known")
    return Path(f"{before}{os.sep}labels{os.sep}{after}").with_suffix(".txt")
