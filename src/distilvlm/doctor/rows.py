"""What the check of a stage's data found: rows that can't be used, and rows that lost their end."""

from __future__ import annotations

from collections.abc import Sequence

from distilvlm.data import BadRow, DataReport, StageData
from distilvlm.models.alone import Encoder
from distilvlm.models.vlm import VLM
from distilvlm.recipe import Recipe, StageSpec

from .finding import Finding, Level

SAME = ("is the same answer as chosen", "nothing to learn: chosen and rejected are the same")
"""How the reasons of pairs without a difference begin."""

CUT = 0.01
"""Share of rows that may lose their end before it is worth a word."""


def check(
    recipe: Recipe, stage: StageSpec, student: VLM | Encoder, teacher: VLM | None, data: StageData, report: DataReport
) -> list[Finding]:
    """Counts of every source, and what is wrong with rows of `stage`."""
    found = [_counts(stage, data, report), *_bad(recipe, stage, report), *_cut(stage, report)]
    if data.pictures_alone:
        return found
    return [*found, *_context(stage, student, teacher if stage.loss.needs_teacher else None, report)]


def _counts(stage: StageSpec, data: StageData, report: DataReport) -> Finding:
    sources = ", ".join(
        f"{source.name} {len(source.records):,} rows"
        + (f" × {source.spec.weight:g} per epoch" if source.spec.weight != 1 else "")
        for source in data.sources
    )
    looked_at = report.samples + len(report.bad)
    text = sources if looked_at >= len(data) else f"{sources}; {looked_at:,} of them looked at"
    if report.samples and data.pictures_alone:
        text += "; different pictures, and nothing else, are looked at"
    elif report.samples:
        text += (
            f"; {report.with_pictures / report.samples:.0%} with pictures, {report.mean:.0f} "
            f"positions on average, {report.longest:,} at most"
        )
    if report.rated:
        text += f"; {report.desirable:,} answers rated desirable, {report.rated - report.desirable:,} undesirable"
    asides = [
        (report.cut, "cut at the end"),
        (report.neutralised, "typed image tokens made harmless"),
        (report.markers_added, "missing picture markers added"),
        (report.answers_dropped, "answers before the first question left out"),
    ]
    text += "".join(f"; {count:,} {what}" for count, what in asides if count)
    return Finding("rows.count", "ok", text, stage=stage.name)


def _bad(recipe: Recipe, stage: StageSpec, report: DataReport) -> list[Finding]:
    """One finding per kind of bad row; the reasons are the template's (`data/template.py`) and the readers'."""
    same = [row for row in report.bad if row.reason.startswith(SAME)]
    empty = [row for row in report.bad if row not in same and row.reason.startswith("nothing to learn")]
    blind = [row for row in report.bad if "visual tokens are more than" in row.reason]
    others = [row for row in report.bad if row not in same and row not in empty and row not in blind]
    longer = f"raise stages.{stage.name}.max_length (now {stage.max_length})"
    kinds = [
        (
            "rows.same",
            same,
            "have the same answer chosen and rejected",
            f"give them another one, or {longer}",
        ),
        ("rows.empty", empty, "have nothing to learn", f"give them an answer, or {longer}"),
        ("rows.pictures", blind, "have pictures that the context cuts", f"{longer}, or take a smaller vision.size"),
        ("rows.unusable", others, "can't be used", "mend them"),
    ]
    quarantine = recipe.machine.on_bad_row == "quarantine"
    level: Level = "warning" if quarantine else "error"
    left_out = "they are left out" if quarantine else "machine.on_bad_row=quarantine leaves them out"
    return [
        Finding(check, level, _named(rows, what, report), f"{fix}; {left_out}", stage.name)
        for check, rows, what, fix in kinds
        if rows
    ]


def _named(rows: Sequence[BadRow], what: str, report: DataReport) -> str:
    looked_at = report.samples + len(report.bad)
    return f"{len(rows):,} of {looked_at:,} rows {what}; the first: {rows[0]}"


def _cut(stage: StageSpec, report: DataReport) -> list[Finding]:
    share = report.cut / max(1, report.samples)
    if share <= CUT:
        return []
    text = f"{share:.0%} of the rows lose their end to max_length ({stage.max_length} positions)"
    fix = f"raise stages.{stage.name}.max_length, or split long conversations"
    return [Finding("rows.cut", "warning", text, fix, stage.name)]


def _context(stage: StageSpec, student: VLM | Encoder, teacher: VLM | None, report: DataReport) -> list[Finding]:
    """Rows that are longer than what a language model was made for; max_length knows nothing of it."""
    found: list[Finding] = []
    for role, vlm in (("student", student), ("teacher", teacher)):
        context = None if vlm is None else getattr(vlm.model.config.get_text_config(), "max_position_embeddings", None)
        longest = (vlm is teacher and report.teachers_longest) or report.longest
        if context is not None and longest > context:
            text = f"the longest row has {longest:,} positions, the {role}'s context is {context:,}"
            fix = f"set stages.{stage.name}.max_length to {context}, or take a {role} with a longer context"
            found.append(Finding("rows.context", "warning", text, fix, stage.name))
    return found
