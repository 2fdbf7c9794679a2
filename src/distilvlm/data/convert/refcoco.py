"""Referring expressions: RefCOCO, RefCOCO+, RefCOCOg. A row per expression, answered by its box."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distilvlm.data.boxes import REFERRING, Box, written
from distilvlm.data.convert.boxes import clipped, problem
from distilvlm.data.convert.conversations import table
from distilvlm.data.convert.items import Fault, Item, Reading, asked, filled
from distilvlm.data.geometry import PictureError, upright_size
from distilvlm.data.problems import DataError

PICKLES = (".p", ".pkl", ".pickle")
EXPORT = "import json, pickle, sys; json.dump(pickle.load(open(sys.argv[1], 'rb')), open(sys.argv[2], 'w'))"

KEPT = ("sent_id", "ref_id", "ann_id", "image_id", "category_id", "split")


def read(
    source: Path,
    images: Path | None = None,
    *,
    annotations: Path | None = None,
    split: str | None = None,
    question: str | None = None,
    decimals: int = 2,
) -> Reading:
    """Rows of one of two forms.

    * JSONL as IAA (and others before it) evaluates: `img_path`, `expression`, `sent_id`, `bbox` (left, top, right,
      bottom in pixels), `height`, `width`; REC_refcoco_unc_val.jsonl and so on.
    * The original (lichengunc/refer): the list of refs (`ref_id`, `image_id`, `ann_id`, `split`, `sentences`), exported
      to JSON, with `instances.json`, whose boxes are left, top, width, height. The pickles in which refs come are
      refused: opening one runs whatever its writer wanted.

    Args:
        source: the JSONL, or the refs.
        images: the pictures' directory; default: the file's own. A picture is looked for under its whole path, then
            under its name.
        annotations: of refs: instances.json.
        split: of refs: train, val, testA, testB, test.
        question: with {expression}; default: LLaVA-1.5's sentence.
        decimals: of a box.

    Raises:
        DataError: the file can't be used, or there is nothing in the split.
    """
    if source.suffix in PICKLES:
        raise DataError(
            f"{source} is a pickle, which runs code when it is opened: where you trust it, export it by\n"
            f'  python -c "{EXPORT}" {source.name!r} refs.json\nand convert refs.json'
        )
    if not 1 <= decimals <= 6:
        raise DataError("decimals: from 1 to 6")
    root = Path(os.path.normpath((images or source.parent).absolute()))
    content = table(source)
    left_out: Counter[str] = Counter()
    if "sentences" in content.names:
        if annotations is None:
            raise DataError(f"{source} holds refs without boxes: say where refer's instances.json is (annotations)")
        found = _of_refs(content.rows, Instances(annotations), split, left_out)
    elif split is not None or annotations is not None:
        raise DataError(f"{source} holds expressions with their boxes: leave split and annotations out")
    else:
        found = _of_lines(content.rows)

    def items() -> Iterator[Item | Fault]:
        for place, row in found:
            yield row if isinstance(row, Fault) else _item(place, row, root, question or REFERRING, decimals)

    return Reading(root, items(), left_out)


Place = tuple[str, int]
"""File and row."""


class Instances:
    """Pictures and boxes of COCO's instances.json."""

    def __init__(self, file: Path) -> None:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            self.pictures = {image["id"]: image for image in content["images"]}
            self.boxes = {one["id"]: one["bbox"] for one in content["annotations"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} can't be read as COCO's instances.json: {type(error).__name__}: {error}") from None


def _of_lines(rows: Any) -> Iterator[tuple[Place, Mapping[str, Any] | Fault]]:
    for file, number, row in rows:
        if isinstance(row, Mapping):
            yield (file, number), row
        else:
            yield (file, number), Fault(file, number, "row", "is no JSON object: mend the line")


def _of_refs(
    rows: Any, instances: Instances, split: str | None, left_out: Counter[str]
) -> Iterator[tuple[Place, Mapping[str, Any] | Fault]]:
    """Every sentence of every ref of the split, as the other form has it."""
    splits: set[str] = set()
    wanted = 0
    for place, ref in _of_lines(rows):
        if isinstance(ref, Fault):
            yield place, ref
            continue
        splits.add(str(ref.get("split")))
        if split is not None and ref.get("split") != split:
            left_out[f"refs not of the split {split}"] += 1
            continue
        wanted += 1
        picture, box = instances.pictures.get(ref.get("image_id")), instances.boxes.get(ref.get("ann_id"))
        sentences = ref.get("sentences")
        if picture is None or box is None:
            what = "image_id" if picture is None else "ann_id"
            yield place, Fault(*place, what, f"{ref.get(what)} is not in instances.json: is it that of the same set?")
        elif not isinstance(sentences, Sequence) or not sentences:
            yield place, Fault(*place, "sentences", "is no list of expressions")
        elif not _numbers(box):
            yield place, Fault(*place, "bbox", f"annotation {ref['ann_id']} has {box!r}: four numbers are expected")
        else:
            left, top, width, height = box
            for sentence in sentences:
                told = sentence if isinstance(sentence, Mapping) else {}
                yield (
                    place,
                    {
                        **ref,
                        "img_path": picture.get("file_name"),
                        "width": picture.get("width"),
                        "height": picture.get("height"),
                        "bbox": [left, top, left + width, top + height],
                        "expression": told.get("sent", told.get("raw")),
                        "sent_id": told.get("sent_id"),
                    },
                )
    if not wanted:
        raise DataError(f"no ref is of the split '{split}'; there are {', '.join(sorted(splits)) or 'none'}")


def _item(place: Place, row: Mapping[str, Any], root: Path, question: str, decimals: int) -> Item | Fault:
    expression, named, box = row.get("expression"), row.get("img_path"), row.get("bbox")
    if not isinstance(expression, str) or not expression.strip():
        return Fault(*place, "expression", "is empty: say what is looked for")
    if not isinstance(named, str) or not named:
        return Fault(*place, "img_path", "names no picture")
    if not _numbers(box):
        return Fault(*place, "bbox", f"{box!r}: left, top, right and bottom in pixels are expected")
    assert isinstance(box, Sequence)
    image = named if (root / named).is_file() else Path(named).name
    try:
        size = upright_size(str(root / image))
    except PictureError as error:
        return Fault(*place, "img_path", f"{error}; say where the pictures are (images)")
    given = (row.get("width", size[0]), row.get("height", size[1]))
    if given != size:
        return Fault(
            *place,
            "width",
            f"says {given[0]} x {given[1]}, but {image} has {size[0]} x {size[1]} pixels: put the original there",
        )
    left, top, right, bottom = (float(number) for number in box)
    corners: Box = (left, top, right, bottom)
    if (reason := problem(corners, size)) is not None:
        return Fault(*place, "bbox", reason)
    corners = clipped(corners, size)
    expression = expression.strip()
    told = {key: row[key] for key in KEPT if row.get(key) is not None}
    meta = {"task": "grounding", "expression": expression, "boxes": [list(corners)], "size": list(size), **told}
    turns = asked(filled(question, {"expression": expression}, "question"), written(corners, size, decimals))
    identity = str(row["sent_id"]) if row.get("sent_id") is not None else f"{image}:{place[1]}"
    return Item(*place, identity, (image,), turns, meta, meta, image_field="img_path")


def _numbers(box: Any) -> bool:
    """Whether a value is four numbers."""
    return (
        isinstance(box, Sequence)
        and not isinstance(box, str)
        and len(box) == 4
        and all(isinstance(number, (int, float)) for number in box)
    )
