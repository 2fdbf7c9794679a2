"""How much of the answers a teacher of other tokens can teach: what has a partner in its rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from distilvlm.data import DataReport
from distilvlm.recipe import Recipe

from .finding import Finding

HALF = 0.5
"""Below this share of its tokens a student is taught by less than half of each answer."""


def check(recipe: Recipe, reports: Mapping[str, DataReport]) -> Iterator[Finding]:
    """The share of tokens that have a partner, of every stage whose teacher reads rows of its own."""
    for stage in recipe.stages:
        share = reports[stage.name].aligned if stage.name in reports else None
        if share is None or not stage.loss.response:
            continue
        report = reports[stage.name]
        text = f"{share:.1%} of the tokens to learn ({report.paired:,} of {report.learned:,}) have a partner in the "
        text += "teacher's rows; the others have no response loss"
        fix = "use one template for both (data.NAME.template: vicuna), or a teacher that writes more of the same tokens"
        if not report.paired:
            fix = f"{fix}, or set stages.{stage.name}.loss.response to 0"
            yield Finding("alignment.share", "error", text, fix, stage.name)
        elif share < HALF:
            yield Finding("alignment.share", "warning", text, fix, stage.name)
        else:
            yield Finding("alignment.share", "ok", text, stage=stage.name)
