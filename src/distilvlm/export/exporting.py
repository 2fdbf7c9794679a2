"""Writing an export and asking it: `distilvlm export`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from distilvlm.data.geometry import Geometry
from distilvlm.models.files import directory_whole, require_free
from distilvlm.models.save import OURS, geometry_of, load, processor_template, stated_dtype
from distilvlm.models.sources import config_of

from .card import card, name_of
from .gguf.language import holding, write_language
from .gguf.speaker import LlamaCpp
from .gguf.tower import CLASS_TOKEN, write_tower
from .gguf.vocabulary import vocabulary
from .gguf.writing import Type
from .hugging_face import Stock, edit, write_stock
from .onnx.graphs import write_graphs
from .onnx.runtime import Graphs
from .ours import PROMPT, Ours, comparable, ends_of, kind_of, questions
from .parity import Case, Parity, Speaker, compare
from .possible import Format, require_possible

PARITY = "parity.json"

BOUNDS: dict[str, float] = {"hf": 1e-5, "onnx": 1e-4, "f16": 0.01, "q8_0": 0.1, "q4_0": 0.1}
"""max |Δlogit| as a part of the largest logit. Of GGUF: to the student with the file's own weights. llama.cpp rounds
what enters a matrix, too: to f16 (1e-3 with SmolLM2's 30 layers), or to 8 bits before a quantised one (2 to 5e-2)."""

_NO_LLAMA = (
    "llama-cpp-python is not installed, so llama.cpp was not asked: pip install llama-cpp-python, and export again"
)


@dataclass(frozen=True)
class Exported:
    """What was written, and what its parity checks found."""

    directory: Path
    files: tuple[str, ...]
    checks: tuple[Parity, ...]  # one per form that was asked
    notes: tuple[str, ...]  # what a user of the files must know

    @property
    def passed(self) -> bool:
        """False where a check found a difference."""
        return all(check.passed for check in self.checks)


class _Questions:
    """What the student and every form of it are asked."""

    def __init__(self, ours: Ours, cases: Sequence[Case], tokens: int) -> None:
        self.ours, self.cases, self.tokens = ours, cases, tokens

    def parity(self, what: str, theirs: Speaker, bound: float, reason: str = "") -> Parity:
        """`reason` is what a difference may come from."""
        tokenizer: Any = self.ours.vlm.tokenizer
        compared = tuple(
            compare(
                case,
                self.ours,
                theirs,
                bound,
                ends=ends_of(self.ours.vlm),
                limit=self.tokens,
                comparable=comparable(self.ours.vlm),
                decode=tokenizer.decode,
            )
            for case in self.cases
        )
        return Parity(what, True, bound, compared, "" if all(case.passed for case in compared) else reason)


def export(
    source: str,
    to: Format,
    out: str | Path,
    *,
    types: Sequence[Type] = ("f16",),
    pictures: Sequence[str] = (),
    prompt: str = PROMPT,
    tokens: int = 24,
) -> Exported:
    """Write a student in a form that other programs load, and check that it says the same there.

    The directory is whole or not there; a failed check leaves it there, with what differs in `parity.json`.

    Args:
        source: a finished student, or any Llava: directory or hub id.
        out: a directory that is not there yet.
        types: of GGUF: one file of the language model for each.
        pictures, prompt: what is asked; default: a drawing, and one question without a picture.
        tokens: of an answer, at most.

    Raises:
        ValueError: what can't go to the format, with the nearest that can.
        FileExistsError: `out` is there.
        PictureError: a picture can't be read.
    """
    require_free(out)
    require_possible(source, to)
    vlm = load(source, stated_dtype(config_of(source, offline_first=False)))
    geometry = geometry_of(source)
    cases = questions(pictures, prompt, plain=kind_of(vlm) == "plain")
    ask = _Questions(Ours(vlm, geometry), cases, tokens)
    with directory_whole(out) as partial:
        checks, notes = _TO[to](ask, partial, source, geometry, types)
        files = tuple(sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file()))
        _write_parity(partial, source, to, checks, notes)
    return Exported(Path(out), files, tuple(checks), tuple(notes))


Written = tuple[list[Parity], list[str]]


def _hf(ask: _Questions, partial: Path, source: str, geometry: Geometry, _: Sequence[Type]) -> Written:
    vlm = ask.ours.vlm
    write_stock(vlm, partial, geometry, processor_template(source))
    vlm.model.float()
    check = ask.parity("hf", Stock(partial, ask.ours), BOUNDS["hf"])
    (partial / "README.md").write_text(card(vlm, source, geometry, check), encoding="utf-8")
    return [check], []


def _gguf(ask: _Questions, partial: Path, source: str, geometry: Geometry, types: Sequence[Type]) -> Written:
    vlm = ask.ours.vlm
    assert vlm.tokenizer is not None
    vlm.model.float()
    name = name_of(source)
    words = vocabulary(vlm.tokenizer, vlm.embedding_rows)
    eyes = partial / "mmproj-f16.gguf"
    class_token = write_tower(vlm, eyes, name)
    for wanted in dict.fromkeys(types):
        write_language(vlm, partial / f"model-{wanted}.gguf", wanted, words, name)
    notes = [_PICTURES[geometry].format(size=vlm.layout.size)]
    if class_token:
        notes.append(f"the tower has a class token: {CLASS_TOKEN}")
    checks: list[Parity] = []
    for wanted in dict.fromkeys(types):
        what = f"gguf {wanted}"
        if not _has_llama_cpp():
            checks.append(Parity(what, False, reason=_NO_LLAMA))
            continue
        theirs = LlamaCpp(partial / f"model-{wanted}.gguf", eyes, ask.ours)
        student = [ask.ours.begin(case) for case in ask.cases]
        try:
            with holding(vlm, wanted):
                if wanted != "f16":
                    rounded = [ask.ours.begin(case) for case in ask.cases]
                    notes.append(_price(wanted, student, rounded))
                checks.append(ask.parity(what, theirs, BOUNDS[wanted], CLASS_TOKEN if class_token else ""))
        finally:
            theirs.close()
    return checks, notes


def _has_llama_cpp() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def _price(wanted: str, student: Sequence[Tensor], rounded: Sequence[Tensor]) -> str:
    moved = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(student, rounded, strict=True))
    return f"{wanted}: rounded weights move the logits of an answer's first token by up to {moved:.1%} of the largest"


def _onnx(ask: _Questions, partial: Path, source: str, geometry: Geometry, _: Sequence[Type]) -> Written:
    vlm = ask.ours.vlm
    write_stock(vlm, partial, geometry, processor_template(source))
    for file in (*partial.glob("*.safetensors*"), partial / OURS):
        file.unlink()
    edit(partial / "config.json", _for_transformers_js)
    vlm.model.float()
    write_graphs(vlm, partial / "onnx")
    return [ask.parity("onnx", Graphs(partial, ask.ours), BOUNDS["onnx"])], []


def _for_transformers_js(config: dict[str, Any]) -> None:
    config["transformers.js_config"] = {"dtype": "fp32", "use_external_data_format": True}


_TO: dict[str, Callable[..., Written]] = {"hf": _hf, "gguf": _gguf, "onnx": _onnx}

_PICTURES: dict[Geometry, str] = {
    "square": "llama.cpp pads pictures to squares, this student was shown them stretched: stretch them to "
    "{size} × {size} pixels first, as was checked",
    "pad": "llama.cpp pads pictures to squares in a colour of its own: to be exact, pad them with the mean colour "
    "first, as was checked",
    "crop": "llama.cpp pads pictures to squares, this student was shown their middle: cut them to squares first, as "
    "was checked",
}


def _write_parity(directory: Path, source: str, to: str, checks: Sequence[Parity], notes: Sequence[str]) -> None:
    known = ("distilvlm", "torch", "transformers", "llama_cpp_python", "gguf", "onnxruntime", "onnx", "onnxscript")
    told = {
        "format": 1,
        "model": name_of(source),
        "to": to,
        "passed": all(check.passed for check in checks) if all(check.checked for check in checks) else None,
        "checks": [check.as_json() for check in checks],
        "notes": list(notes),
        "versions": {name: version for name in known if (version := _version(name)) is not None},
    }
    text = json.dumps(told, indent=1, ensure_ascii=False)
    (directory / PARITY).write_text(text + "\n", encoding="utf-8")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
