"""Strange files: whole ones that were damaged at random, and trees of JSON or YAML with strange values in them."""

from __future__ import annotations

import copy
import io
import json
import struct
import zlib
from typing import Any

from hypothesis import strategies as st
from PIL import Image

Tree = Any

STRANGE: list[Tree] = [None, True, -1, 0, 10**30, 1e308, float("nan"), float("inf"), "", "\0", "\ud800", "é" * 5000]
STRANGE += ["<image>", "../" * 50, "a/" * 3000, "data:,", "http://[", "file://\0", [], {}, [[]], {"": {"": []}}]
STRANGE += ["2024-99-99", "0x", "1e-3", "~", "${", "${X:-}", "null", {"do": "insert"}, {"from": 3}, [None], [0.5] * 40]

YAML = ["&a [*a, *a]", "*nowhere", "!!python/object/apply:os.system [id]", "!!binary x", "!!timestamp x", "!!int x"]
YAML += ["2024-99-99", "[" * 500, "{" * 500, "- " * 500, "? [1]\n: 2", "<<: 3", "<<: [1]", "1" * 6000, "!!set {a}"]
YAML += ["!!float x", "!!omap [3]", "!!pairs 3", "{a: 1, a: 2}", "\t", "\0", "\ufeff", "--- 1\n--- 2", "%YAML 9.9", "'"]
YAML += [
    "!!null x",
    "!!bool x",
    "190:20:30",
    "0b",
    "0o8",
    "=",
    "!!str [a]",
    "!!map [a]",
    "!!seq {a: 1}",
    "\x85",
    "\ud800",
]
LAUGHS = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
"""A billion laughs: 9¹⁰ entries out of 400 bytes."""


def lines(text: str) -> st.SearchStrategy[str]:
    """A text with lines that are doubled, lost, indented otherwise, or hold something else than they did."""
    whole = text.splitlines()

    @st.composite
    def made(draw: st.DrawFn) -> str:
        mine = list(whole)
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(mine) - 1))
            key, _, value = mine[at].partition(": ")
            odd = draw(st.sampled_from(YAML) | st.text(max_size=8) | st.floats().map(str) | st.integers().map(str))
            mine[at : at + 1] = draw(
                st.sampled_from(
                    [[f"{key}: {odd}"], [f"{odd}: {value}"], [mine[at]] * 2, [], ["  " + mine[at]], [mine[at], odd]]
                )
            )
            mine = mine or [odd]
        if draw(st.integers(0, 99)) == 0:
            mine = [f"a0: &a0 [{draw(st.text(max_size=3))!r}]", LAUGHS, *mine, "stages: *a11"]
        return "\n".join(mine)

    return made()


def trees(whole: Tree) -> st.SearchStrategy[Tree]:
    """JSON whose values, somewhere, are others, lost, or stand elsewhere, too."""
    places = [place for place in _places(whole) if place]
    odd = st.sampled_from(STRANGE) | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
        max_leaves=6,
    )

    @st.composite
    def made(draw: st.DrawFn) -> Tree:
        mine = copy.deepcopy(whole)
        for _ in range(draw(st.integers(1, 3))):
            *way, last = draw(st.sampled_from(places))
            here = mine
            for step in way:
                here = _inside(here, step)
            if not _has(here, last):
                continue  # an earlier change took it
            what = draw(st.integers(0, 4))
            if what == 0:
                del here[last]
            elif what == 1 and isinstance(here, dict):
                here[draw(st.text(max_size=6))] = here.pop(last)
            elif what == 2:
                here[last] = [here[last]]
            else:
                here[last] = copy.deepcopy(draw(odd))
        return mine

    return made()


def written(tree: Tree) -> str:
    """As JSON; half characters and numbers that are none stay what they are."""
    return json.dumps(tree, ensure_ascii=True)


def damaged(whole: bytes, longest: int = 1 << 20) -> st.SearchStrategy[bytes]:
    """Bytes of which some are others, lost or doubled; early ones more often, where headers are."""
    size = len(whole)
    at = st.integers(0, size - 1) | st.integers(0, min(size - 1, 200))
    number = st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\xff\xff"])
    edit = st.tuples(at, st.integers(0, 4), st.binary(min_size=1, max_size=6) | number, st.integers(1, size))

    def made(edits: list[tuple[int, int, bytes, int]]) -> bytes:
        mine = bytearray(whole)
        for place, what, some, length in edits:
            if what == 0:
                mine[place : place + len(some)] = some
            elif what == 1:
                mine[place:place] = some
            elif what == 2:
                del mine[place : place + length % 64]
            elif what == 3:
                mine[place:place] = mine[place : place + length]
            else:
                del mine[max(1, place) :]
        return bytes(mine[:longest])

    return st.lists(edit, min_size=1, max_size=6).map(made)


def pictures() -> list[bytes]:
    """Small pictures in the formats that data sets have, in the modes that these know."""
    found = []
    for kind, modes in {
        "PNG": ("RGB", "RGBA", "P", "L", "LA", "1", "I;16"),
        "JPEG": ("RGB", "L", "CMYK"),
        "WEBP": ("RGB", "RGBA"),
        "GIF": ("P", "L"),
        "BMP": ("RGB", "P"),
        "TIFF": ("RGB", "I;16", "F"),
    }.items():
        for mode in modes:
            image = Image.effect_noise((24, 16), 60)
            image = Image.new(mode, image.size, 300) if mode == "I;16" else image.convert(mode)
            file = io.BytesIO()
            more: dict[str, Any] = {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}
            if kind == "GIF":
                more = {"save_all": True, "append_images": [image.copy()]}
            image.save(file, kind, **(more if kind in ("PNG", "JPEG", "WEBP", "GIF") else {}))
            found.append(file.getvalue())
    return found


def bombs() -> list[bytes]:
    """Pictures that say they are large: in their header, in a text beside it, in how often they are packed."""
    bombs = [png(*size) for size in ((100_000, 100_000), (2**31 - 1, 1), (1, 2**31 - 1), (9_000, 9_000), (0, 5))]
    bombs.append(png(8, 8, _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * 2**26, 9))))
    bombs.append(png(8, 8, _chunk(b"iCCP", b"p\0\0" + zlib.compress(b"\0" * 2**26, 9))))
    gif = (
        b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0," + struct.pack("<HHHH", 0, 0, 65535, 65535) + b"\0\x02"
    )
    return [*bombs, gif, b"RIFF\xff\xff\xff\x7fWEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff" * 6, b"BM" + b"\xff" * 60]


def png(width: int, height: int, more: bytes = b"") -> bytes:
    """A PNG of that size by its header, with the pixels of a small one."""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = _chunk(b"IDAT", zlib.compress(b"\0" * 200)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + more + body


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _places(tree: Tree, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    below: list[tuple[Any, ...]] = []
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            below += _places(value, (*way, key))
    return [way, *below]


def _has(tree: Tree, key: Any) -> bool:
    return (isinstance(tree, dict) and key in tree) or (
        isinstance(tree, list) and isinstance(key, int) and key < len(tree)
    )


def _inside(tree: Tree, key: Any) -> Tree:
    return tree[key] if _has(tree, key) else None
