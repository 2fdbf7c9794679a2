"""What trains, in which dtype, and what nobody ever trained."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch

from distilvlm.data import StageData
from distilvlm.models.alone import Encoder
from distilvlm.models.parts import NEVER, Parameters, PartRow, by_leaf, parameters_of, summary
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe, StageSpec

from .finding import Finding


def trained(student: VLM | Encoder, names: Sequence[str]) -> dict[str, Parameters]:
    """Leaf part -> its parameters, of what a stage with `train: names` trains; the student stays as it is.

    Raises:
        ValueError: no such part.
    """
    for name in known(student, names):
        parameters_of(student.model, name)
    return {
        leaf: members
        for leaf, members in by_leaf(student.model).items()
        if leaf not in NEVER and owner(leaf, names) is not None
    }


def known(student: VLM | Encoder, names: Iterable[str]) -> list[str]:
    """The names without adapters where it is not known what they are, because encoders are not here."""
    return [name for name in names if name != "adapters" or hasattr(student.model, "adapters")]


def owner(leaf: str, names: Iterable[str]) -> str | None:
    """The name in a stage's `train` that stands for this leaf: the closest one."""
    covering = [name for name in names if leaf == name or leaf.startswith(f"{name}.")]
    return max(covering, key=len, default=None)


def check(
    recipe: Recipe,
    student: VLM | Encoder,
    shapes: Mapping[str, VLM | Encoder],
    teacher: VLM | None,
    data: Mapping[str, StageData],
) -> list[Finding]:
    """Per stage what trains and its dtype; then what is random and stays so.

    Args:
        student: as the first stage finds it.
        shapes: stage -> the student as it trains there; it may be without weights.
    """
    stages = [stage for stage in recipe.stages if stage.name in shapes]
    found = [finding for stage in stages for finding in _stage(stage, shapes[stage.name])]
    trains = {leaf for stage in stages for leaf in trained(shapes[stage.name], stage.train)}
    found += _random_student(student, trains, data)
    if teacher is not None:
        found += _teacher(recipe, teacher)
    return found


def _stage(stage: StageSpec, student: VLM | Encoder) -> list[Finding]:
    leaves = trained(student, stage.train)
    by_name: dict[str, Parameters] = {name: {} for name in stage.train}
    for leaf, members in leaves.items():
        by_name[str(owner(leaf, stage.train))] |= members
    text = ", ".join(f"{name} {_size(members)} {_dtypes(members)}" for name, members in by_name.items())
    frozen = _frozen(student, leaves)
    frozen_text = f"; frozen: {', '.join(frozen)}" if frozen else ""
    found = [Finding("parts.trains", "ok", f"trains {text}{frozen_text}", stage=stage.name)]
    coarse = [name for name, members in by_name.items() if any(p.dtype.itemsize < 4 for p in members.values())]
    if coarse:
        kept = " and ".join(f"{name} in {_dtypes(by_name[name])}" for name in coarse)
        found.append(
            Finding(
                "parts.master",
                "error",
                f"what trains is held in 16 bits ({kept}): most steps of a small rate are rounded away (with bf16 "
                "weights and a rate of 2e-5, 4% of SmolLM2's weights moved in 5 updates)",
                "build the student in float32; machine.precision: bf16 computes in bf16 without holding weights in it",
                stage.name,
            )
        )
    unread = [row for row in summary(student.model) if row.name == "vision.unread"]
    if unread and any(leaf == "vision" for leaf in leaves):
        text = f"{unread[0].parameters:,} parameters of the tower lie behind the layer that is read: they do not train"
        found.append(Finding("parts.unread", "ok", text, stage=stage.name))
    return found


def _frozen(student: VLM | Encoder, trains: Iterable[str]) -> list[str]:
    """Leaves that do not train; a language model that is frozen as a whole is named as a whole."""
    rows = [row for row in summary(student.model) if row.name not in trains]
    language = [row for row in rows if owner(row.name, ["language"])]
    if language and len(language) == len(_leaves(student, "language")):
        whole = parameters_of(student.model, "language")
        rows = [row for row in rows if row not in language]
        return [*_described(rows), f"language {_size(whole)} {_dtypes(whole)}"]
    return _described(rows)


def _described(rows: Iterable[PartRow]) -> list[str]:
    return [f"{row.name} {row.parameters:,} {row.dtype}" for row in rows]


def _random_student(student: VLM | Encoder, trains: Collection[str], data: Mapping[str, StageData]) -> list[Finding]:
    pictures = not data or any(bool((stage_data.picture_counts > 0).any()) for stage_data in data.values())
    found: list[Finding] = []
    for part in _random(student):
        idle = [leaf for leaf in _leaves(student, part) if leaf not in trains]
        if not idle:
            continue
        if part == "projector" and "adaptor.projector" in trains:
            text = "the base's projector is randomly initialised and stays so: its copies in adaptors train"
            found.append(Finding("parts.random", "ok", text))
            continue
        what = part if len(idle) == len(_leaves(student, part)) else ", ".join(idle)
        if part != "language" and not pictures:
            text = f"{what} is randomly initialised and trains in no stage; no row has a picture, so nothing passes it"
            found.append(Finding("parts.random", "ok", text))
            continue
        origin = "student.from" if part == "projector" else f"student.{part}.from"
        found.append(
            Finding(
                "parts.random",
                "warning",
                f"{what} is randomly initialised and trains in no stage: it stays noise",
                f"add '{part}' to the train list of a stage, or start from trained weights ({origin})",
            )
        )
    return found


def _teacher(recipe: Recipe, teacher: VLM) -> list[Finding]:
    if not any(stage.loss.needs_teacher for stage in recipe.stages):
        return []
    rows = summary(teacher.model)
    total = sum(row.parameters for row in rows)
    dtype = "+".join(sorted({row.dtype for row in rows}))
    found = [Finding("parts.teacher", "ok", f"teacher: {total:,} parameters, held in {dtype}")]
    if random := _random(teacher):
        found.append(
            Finding(
                "parts.teacher",
                "warning",
                f"the teacher's {' and '.join(random)} {'is' if len(random) == 1 else 'are'} randomly initialised: it "
                "teaches noise",
                "train it first, and name what that run made: teacher: {from: RUN/model}",
            )
        )
    return found


def _random(vlm: VLM | Encoder) -> list[str]:
    """Parts that were drawn and never trained."""
    found = [part for part in ("vision", "projector", "language") if part in vlm.random_parts]
    if isinstance(vlm, VLM) and "projector" not in found and _projector_is_as_drawn(vlm):
        found.append("projector")
    return found


def _projector_is_as_drawn(vlm: VLM) -> bool:
    """A checkpoint doesn't say what trained, but a projector is drawn with biases of exactly 0, and the first update
    moves them."""
    biases = [p for name, p in parameters_of(vlm.model, "projector").items() if name.endswith("bias")]
    if not biases or biases[0].is_meta:
        return False
    return all(not bool(torch.count_nonzero(bias)) for bias in biases)


def _leaves(vlm: VLM | Encoder, part: str) -> list[str]:
    return [leaf for leaf in by_leaf(vlm.model) if leaf not in NEVER and owner(leaf, [part])]


def _size(members: Parameters) -> str:
    return f"{sum(parameter.numel() for parameter in members.values()):,}"


def _dtypes(members: Parameters) -> str:
    return "+".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in members.values()}))
