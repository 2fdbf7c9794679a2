"""Pascal VOC: an XML file per picture, boxes in whole pixels that count from 1, the last one included."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from distilvlm.data.boxes import Box
from distilvlm.data.convert.absent import Negatives
from distilvlm.data.convert.asking import Asking
from distilvlm.data.convert.boxes import Boxed, checked
from distilvlm.data.convert.items import Fault, Item, Reading
from distilvlm.data.convert.pictures import is_picture
from distilvlm.data.geometry import PictureError, upright_size
from distilvlm.data.problems import DataError

PICTURES = ("JPEGImages", "images", "Images")
ANNOTATIONS = ("Annotations", "annotations")


def read(
    source: Path,
    images: Path | None = None,
    *,
    split: str | None = None,
    difficult: Literal["keep", "leave"] = "keep",
    origin: int = 1,
    task: str = "detect",
    question: str | None = None,
    absent: int = 0,
    decimals: int = 2,
    negatives: Negatives = "random",
    rated: bool = False,
) -> Reading:
    """Rows about the boxes of XML files; see `asking.Asking` for what is asked of them.

    An annotation's picture is the one that its `filename` names or, where there is none, the one of the XML's own name.

    Args:
        source: a data set with `Annotations` (or `annotations`) in it, or the directory of XML files itself.
        images: the pictures' directory; default: `JPEGImages` or `images` beside the annotations.
        split: only what ImageSets/Main/SPLIT.txt lists.
        difficult: "leave" leaves out objects marked so, as VOC's own evaluation does; they are counted.
        origin: pixel that counting starts from: 1 as in VOC, or 0, where xmax and ymax lie behind the last pixel, as
            many tools write it.

    Raises:
        DataError: no XML file, no picture directory, no such split.
    """
    asking = Asking(task, question, absent, decimals, negatives, rated)
    if difficult not in ("keep", "leave") or origin not in (0, 1):
        raise DataError("difficult is keep or leave; origin is 0 or 1")
    annotations = next((source / name for name in ANNOTATIONS if (source / name).is_dir()), source)
    files = _files(annotations, split)
    root = _picture_root(annotations, images)
    left_out: Counter[str] = Counter()

    def items() -> Iterator[Item | Fault]:
        pictures: list[Boxed] = []
        for file in files:
            boxed, faults = _boxed(file, root, origin, difficult, left_out)
            yield from faults
            if boxed is not None and not faults:
                pictures.append(boxed)
        if split is None:
            named = {path.stem for path in files} | {Path(picture.image).stem for picture in pictures}
            alone = sum(path.stem not in named for path in root.iterdir() if is_picture(path))
            if alone:
                left_out["pictures without an XML file"] += alone
        names = sorted({name for picture in pictures for name, _ in picture.things})
        yield from asking.items(pictures, names, left_out)

    return Reading(root, items(), left_out, rated)


def _boxed(
    file: Path, root: Path, origin: int, difficult: str, left_out: Counter[str]
) -> tuple[Boxed | None, list[Fault]]:
    try:
        tree = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, OSError, ValueError) as error:
        return None, [Fault(str(file), None, "xml", f"can't be parsed: {error}; write the file anew")]
    name = _picture(tree, file, root)
    if name is None:
        named = tree.findtext("filename")
        reason = f"neither {root / str(named)} nor a picture called {file.stem}; mend it, or name the folder (images)"
        return None, [Fault(str(file), None, "filename", reason)]
    try:
        size = upright_size(str(root / name))
    except PictureError as error:
        return None, [Fault(str(file), None, "filename", f"{error}; put a whole picture there")]
    given = tuple(_number(tree.findtext(f"size/{side}")) for side in ("width", "height"))
    if all(given) and given != size:
        reason = f"says {given[0]:g} x {given[1]:g}, but {name} has {size[0]} x {size[1]} pixels: was it resized?"
        return None, [Fault(str(file), None, "size", f"{reason} Put the original there, or scale the boxes")]

    things: list[tuple[int, str, Box]] = []
    faults: list[Fault] = []
    for row, thing in enumerate(tree.iter("object")):
        label = (thing.findtext("name") or "").strip()
        corners = [_number(thing.findtext(f"bndbox/{corner}")) for corner in ("xmin", "ymin", "xmax", "ymax")]
        left, top, right, bottom = corners
        if not label:
            faults.append(Fault(str(file), row, "name", "is empty: say what the object is"))
        elif left is None or top is None or right is None or bottom is None:
            faults.append(Fault(str(file), row, "bndbox", f"{label}: xmin, ymin, xmax and ymax must be numbers"))
        elif left >= right or top >= bottom:  # a box of one pixel is a slip of the mouse
            reason = f"{label} [{left:g}, {top:g}, {right:g}, {bottom:g}] is empty or inverted: mend or remove it"
            faults.append(Fault(str(file), row, "bndbox", reason))
        elif origin == 1 and min(left, top) == 0:
            reason = f"{label} begins at pixel 0, but VOC counts from 1: if all of these files do, set origin to 0"
            faults.append(Fault(str(file), row, "bndbox", reason))
        elif difficult == "leave" and (thing.findtext("difficult") or "0").strip() not in ("0", ""):
            left_out["objects marked difficult"] += 1
        else:
            things.append((row, label, (left - origin, top - origin, right, bottom)))
    boxed, bad = checked(str(file), name, size, things)
    return boxed, [*faults, *bad]


def _picture(tree: ElementTree.Element, file: Path, root: Path) -> str | None:
    named = (tree.findtext("filename") or "").strip()
    if named and (root / named).is_file():
        return named
    return next((path.name for path in sorted(root.glob(f"{file.stem}.*")) if is_picture(path)), None)


def _files(annotations: Path, split: str | None) -> list[Path]:
    if not annotations.is_dir():
        raise DataError(f"no directory {annotations}: name the data set, or the directory of its XML files")
    if split is None:
        files = sorted(annotations.glob("*.xml"))
        if not files:
            raise DataError(f"no XML file in {annotations}")
        return files
    listed = annotations.parent / "ImageSets" / "Main" / f"{split}.txt"
    if not listed.is_file():
        there = ", ".join(sorted(path.stem for path in listed.parent.glob("*.txt"))) or "none"
        raise DataError(f"no split '{split}': {listed} is not there; there is {there}")
    stems = [line.split()[0] for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
    missing = [stem for stem in stems if not (annotations / f"{stem}.xml").is_file()]
    if missing:
        raise DataError(f"{listed} lists '{missing[0]}', but {annotations / missing[0]}.xml is not there")
    return [annotations / f"{stem}.xml" for stem in stems]


def _picture_root(annotations: Path, images: Path | None) -> Path:
    places = [images] if images is not None else [annotations.parent / name for name in PICTURES]
    root = next((place for place in places if place.is_dir()), None)
    if root is None:
        looked = ", ".join(map(str, places))
        raise DataError(f"no directory of pictures ({looked}); say where they are (images)")
    return Path(os.path.normpath(root.absolute()))


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
