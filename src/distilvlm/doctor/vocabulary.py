"""Do teacher and student mean the same by an id? Divergences compare probabilities id by id."""

from __future__ import annotations

from distilvlm.models.vlm import IMAGE_TOKEN, VLM
from distilvlm.recipe import Recipe

from .finding import Finding


def check(recipe: Recipe, student: VLM, teacher: VLM | None) -> list[Finding]:
    """The map of tokens, special tokens and the image token's id; nothing without a tokenizer (a plan's)."""
    if student.tokenizer is None or (teacher is not None and teacher.tokenizer is None):
        return []
    compared = [stage.name for stage in recipe.stages if stage.loss.needs_teacher]
    aligned = recipe.teacher is not None and recipe.teacher.tokens == "aligned"
    tokens = _alone(student)
    if teacher is not None:
        tokens = _compared(student, teacher, compared, teachers_terms(recipe), aligned)
    return [tokens, *_special(student), _image(student)]


def _tokens(vlm: VLM) -> dict[int, str]:
    """id -> token, without `<image>`, whose id is a placeholder's and may differ between the two."""
    assert vlm.tokenizer is not None
    return {id: token for token, id in vlm.tokenizer.get_vocab().items() if id != vlm.image_id}


def _alone(student: VLM) -> Finding:
    count, rows = len(_tokens(student)), student.embedding_rows
    return Finding(
        "vocabulary.tokens", "ok", f"{count:,} tokens, {rows:,} embedding rows ({rows - count:,} of padding)"
    )


def teachers_terms(recipe: Recipe) -> str:
    """The terms of a recipe that a teacher is needed for, "response, visual and relation"."""
    every = ("response", "visual", "relation", "preference")
    *terms, last = [name for name in every if any(getattr(stage.loss, name) for stage in recipe.stages)] or every
    return f"{', '.join(terms)} and {last}" if terms else last


def _compared(student: VLM, teacher: VLM, stages: list[str], terms: str, aligned: bool) -> Finding:
    ours, theirs = _tokens(student), _tokens(teacher)
    both = ours.keys() | theirs.keys()
    differing = sorted(id for id in both if ours.get(id) != theirs.get(id))
    if not differing:
        padding = [vlm.embedding_rows - len(ours) for vlm in (student, teacher)]
        return Finding(
            "vocabulary.tokens",
            "ok",
            f"{len(ours):,} tokens, each with the same id in teacher and student; rows of padding: student "
            f"{padding[0]:,}, teacher {padding[1]:,}",
        )
    first = differing[0]
    text = (
        f"{len(differing):,} of {len(both):,} ids mean another token to the teacher than to the student; the first is "
        f"{first}: student {ours.get(first)!r}, teacher {theirs.get(first)!r}"
    )
    if not stages:
        return Finding("vocabulary.tokens", "ok", f"{text}. No loss term compares the two")
    if aligned:
        return Finding("vocabulary.tokens", "ok", f"{text}. They are compared without ids (teacher.tokens: aligned)")
    fix = (
        f"choose a student of the teacher's family (its tokenizer), set {terms} to 0 in {', '.join(stages)}, or "
        "compare the two where their tokens begin at the same character (teacher.tokens: aligned)"
    )
    return Finding("vocabulary.tokens", "error", text, fix)


def _special(student: VLM) -> list[Finding]:
    tokenizer = student.tokenizer
    assert tokenizer is not None
    if tokenizer.eos_token_id is None:
        text = "the tokenizer has no end-of-text token: the finished student can't stop where no turn ends"
        return [Finding("vocabulary.special", "warning", text, "set eos_token in the tokenizer's directory")]
    text = (
        f"end of text {tokenizer.eos_token!r} is id {tokenizer.eos_token_id}, padding {tokenizer.pad_token!r} is "
        f"{tokenizer.pad_token_id}"
    )
    return [Finding("vocabulary.special", "ok", text)]


def _image(student: VLM) -> Finding:
    if student.image_id_is_virtual:
        place = "virtual: no embedding row is to spare, a saved model gets one of zeros"
    else:
        place = f"a spare row of the {student.embedding_rows:,} of the embedding"
    return Finding("vocabulary.image", "ok", f"{IMAGE_TOKEN} is id {student.image_id}, {place}")
