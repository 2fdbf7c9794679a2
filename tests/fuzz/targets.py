"""What strange input is given to, and the whole input that it is made of. Each works in a directory."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from hypothesis import strategies as st
from torch import nn

from distilvlm.data import Template, boxes, geometry
from distilvlm.data.readers import read
from distilvlm.evaluate.grounding.measure import judge
from distilvlm.evaluate.questions import Question
from distilvlm.models import files
from distilvlm.models.adaptors import AdaptorConfig, Host
from distilvlm.models.adaptors import files as adaptor_files
from distilvlm.models.compose import build
from distilvlm.models.save import geometry_of, load, save
from distilvlm.recipe import SourceSpec, load_recipe
from distilvlm.recipe.models import ModelSpec
from distilvlm.runs import checkpoint
from tests import adaptor_hosts
from tests.data.small_data import make_tokenizer
from tests.fuzz import inputs
from tests.runs.tiny import VISION, language, write_tokenizer

RECIPES = Path(__file__).parents[2] / "recipes"


class Target(NamedTuple):
    strategy: st.SearchStrategy[Any]
    run: Callable[[Any], object]


def recipes(directory: Path) -> Target:
    """Recipe files, their lines changed, with overrides."""
    whole = [file.read_text(encoding="utf-8") for file in sorted(RECIPES.glob("*.yaml"))]
    file = directory / "recipe.yaml"
    for path in RECIPES.glob("*.yaml"):
        shutil.copy(path, directory)
    override = st.builds(
        "{}={}".format,
        st.sampled_from(
            ["stages.0.optim.lr", "stages.dpt", "data..x", "teacher.from", "seed", "preset", "student.a.b"]
        ),
        st.sampled_from(inputs.YAML) | st.text(max_size=6),
    )
    strategy = st.tuples(st.sampled_from(whole).flatmap(inputs.lines), st.lists(override, max_size=1))

    def run(given: tuple[str, list[str]]) -> None:
        file.write_bytes(given[0].encode("utf-8", "surrogatepass"))
        load_recipe(file, given[1])

    return Target(strategy, run)


TALK: list[Any] = [
    {
        "id": 1,
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}],
    },
    {
        "images": ["a.png"],
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        ],
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]},
            {"role": "assistant", "content": "red"},
        ],
    },
    {"prompt": "what?", "image": "a.png", "chosen": "red", "rejected": [{"role": "assistant", "content": "blue"}]},
    {"prompt": [{"role": "user", "content": "what?"}], "completion": "red", "label": True},
]


def rows(directory: Path) -> Target:
    """Data files of LLaVA's rows, messages and preferences; what is read is written by templates."""
    (directory / "a.png").write_bytes(inputs.pictures()[0])
    templates = [Template.of(kind, make_tokenizer()) for kind in ("chat", "vicuna", "plain")]
    tree = st.sampled_from(TALK).flatmap(inputs.trees)
    texts = st.lists(tree, min_size=1, max_size=3)
    as_list = texts.map(lambda rows: inputs.written(rows).encode())
    as_lines = texts.map(lambda rows: "\n".join(map(inputs.written, rows)).encode())
    nested = st.integers(500, 100_000).map(lambda n: b'[{"conversations": ' + b"[" * n)
    huge = st.integers(4000, 9000).map(lambda n: b'[{"id": ' + b"9" * n + b"}]")
    broken = st.sampled_from([inputs.written(TALK), "\n".join(map(inputs.written, TALK))]).flatmap(
        lambda text: inputs.damaged(text.encode())
    )
    strategy = st.one_of(as_list, as_lines, as_list, as_lines, broken, nested | huge | st.binary(max_size=40))
    file = directory / "rows.json"

    def run(given: bytes) -> None:
        file.write_bytes(given)
        source = read(SourceSpec(path=str(file)), "fuzz")
        for record in source.records:
            for template in templates:
                template.encode(record, 4, 64)

    return Target(strategy, run)


def pictures(directory: Path) -> Target:
    """Pictures with other bytes, and bombs."""
    file = directory / "picture"
    strategy = st.one_of(st.sampled_from(inputs.pictures() * 3 + inputs.bombs()).flatmap(inputs.damaged))

    def run(given: bytes) -> None:
        file.write_bytes(given)
        geometry.header(str(file))
        geometry.upright_size(str(file))
        image = geometry.decode(str(file))
        for kind in ("square", "pad", "crop"):
            geometry.canvas(image, kind, 16)

    return Target(strategy, run)


def box_strings(directory: Path) -> Target:
    """Answers that should be boxes, and true boxes that should be numbers."""
    number = st.sampled_from(["0.5", "1", "0", ".5", "1.5", "-1", "1e9", "nan", "0." + "9" * 500, "١", "0.5 "])
    box = st.lists(number | st.text(max_size=3), min_size=3, max_size=5).map(lambda four: f"[{', '.join(four)}]")
    answer = st.lists(box | st.text(max_size=10), max_size=4).map("; ".join) | st.integers(1, 20_000).map("[".__mul__)
    meta = inputs.trees({"boxes": [[1, 2, 30, 40], [5, 5, 6.5, 6.5]], "size": [64, 48]})

    def run(given: tuple[str, Any]) -> None:
        boxes.parsed(given[0])
        question = Question.of(("rows.json", 0), "0", [], "where?", "[0, 0, 1, 1]", given[1])
        judge(question, given[0])
        judge(question, "[0.1, 0.2, 0.3, 0.4]; [0, 0, 0, 0]")

    return Target(st.tuples(answer, meta), run)


def adaptors(directory: Path) -> Target:
    """Directories of an adaptor of which a file was damaged, with a manifest that knows it or not."""
    whole = directory / "whole"
    made = adaptor_hosts.host("llama-tied", one=AdaptorConfig(positions=(1,), structure="b"))
    adaptor_files.save(made, "one", whole)
    host = Host.attach(adaptor_hosts.model("llama-tied"))

    def run(place: Path) -> None:
        adaptor_files.load(host, place, "one", accept_other_weights=True)
        host.remove("one")

    def clean(place: Path) -> None:
        try:
            run(place)
        finally:
            for name in host.names:
                host.remove(name)

    return _directories(whole, directory / "damaged", clean)


def checkpoints(directory: Path) -> Target:
    """Stock checkpoints of which a file was damaged."""
    write_tokenizer(directory / "tokenizer")
    vision = {**VISION, "num_hidden_layers": 2}
    student = {
        "vision": {"config": vision},
        "language": {"config": language(16, 1), "tokenizer": str(directory / "tokenizer")},
    }
    whole = directory / "whole"
    save(build(ModelSpec.model_validate(student), 0), whole, "pad")

    def run(place: Path) -> None:
        geometry_of(place)
        load(place)

    return _directories(whole, directory / "damaged", run)


def run_checkpoints(directory: Path) -> Target:
    """Checkpoints of a run of which a file was damaged."""
    module = nn.Linear(3, 2)
    parameters = dict(module.named_parameters())
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    whole = directory / "whole" / "000001"
    position = checkpoint.Position("dpt", 1, 0, "0" * 64)
    states = {"0": torch.zeros(8, dtype=torch.uint8)}
    checkpoint.save(whole, position, parameters, optimizer, states, Accelerator(cpu=True))

    def run(place: Path) -> None:
        if checkpoint.last_whole(place.parent) is not None:
            checkpoint.read_position(place)
            checkpoint.load(place, parameters, optimizer)

    return _directories(whole, directory / "damaged" / "000001", run)


def _directories(whole: Path, place: Path, run: Callable[[Path], object]) -> Target:
    """Directories like `whole`, at `place`, with one or two files that are others; half of them pass their manifest."""
    contents = {str(file.relative_to(whole)): file.read_bytes() for file in sorted(whole.rglob("*")) if file.is_file()}
    changed = st.sampled_from(sorted(contents)).flatmap(
        lambda name: st.tuples(st.just(name), st.one_of(*_others(name, contents[name])))
    )
    strategy = st.tuples(st.lists(changed, min_size=1, max_size=2), st.booleans())

    def write(given: tuple[list[tuple[str, bytes | None]], bool]) -> None:
        shutil.rmtree(place, ignore_errors=True)
        others = dict(given[0])
        for name, content in {**contents, **others}.items():
            if content is not None:
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_bytes(content)
        if given[1] and files.MANIFEST not in others:
            files.manifest(place)
        run(place)

    return Target(strategy, write)


def _others(name: str, content: bytes) -> list[st.SearchStrategy[bytes | None]]:
    found: list[st.SearchStrategy[bytes | None]] = [inputs.damaged(content), st.none()]
    if name.endswith(".json"):
        tree = inputs.trees(json.loads(content)).map(inputs.written)
        found += [tree.map(str.encode)] * 4 + [st.just(b"[" * 100_000), st.just(b"{}"), st.just(b"[]"), st.just(b"3")]
    if name.endswith(".safetensors"):
        length = struct.unpack("<Q", content[:8])[0]
        head, body = json.loads(content[8 : 8 + length]), content[8 + length :]
        made = inputs.trees(head).map(inputs.written).map(str.encode)
        found += [made.map(lambda text: struct.pack("<Q", len(text)) + text + body)] * 4
    return found


TARGETS: dict[str, Callable[[Path], Target]] = {
    "recipes": recipes,
    "rows": rows,
    "pictures": pictures,
    "boxes": box_strings,
    "adaptors": adaptors,
    "checkpoints": checkpoints,
    "run checkpoints": run_checkpoints,
}
