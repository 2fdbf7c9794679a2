"""Where a teacher's targets come from, when not from a model in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distilvlm.recipe.section import Section

if TYPE_CHECKING:
    from distilvlm.recipe.schema import Recipe


class KeepSpec(Section):
    """What a teacher of kind `cached` keeps on disk of what it thinks."""

    path: str = Field(default="teacher-cache", description="directory of the cache; recipes may share one")
    responses: Literal["hidden", "top_k", "sampled"] = Field(
        default="hidden",
        description="hidden: exact, hidden states; top_k: the likeliest ids, and the rest's mass as one event; "
        "sampled: ids drawn from the teacher (unbiased)",
    )
    visual: Literal["hidden", "relation"] = Field(
        default="hidden", description="hidden: exact for every term; relation: its matrix alone, for loss.relation"
    )
    top_k: int = Field(default=64, gt=0, description="ids kept of a row (responses: top_k)")
    draws: int = Field(default=64, gt=0, description="ids drawn for a row (responses: sampled)")
    precision: Literal["computed", "bf16"] = Field(
        default="computed", description="of hidden states: what they were computed in (exact), or rounded to bf16"
    )


class RemoteSpec(Section):
    """A server that holds the teacher."""

    url: str = Field(description="e.g. http://HOST:PORT")
    protocol: Literal["distilvlm", "openai"] = Field(
        default="distilvlm",
        description="distilvlm: `distilvlm teach MODEL`, exact; openai: a server that gives log-probabilities of "
        "prompts (vLLM, SGLang), the likeliest ids of each position",
    )
    model: str | None = Field(default=None, description="the model's name at the server; default: its first one")
    top_k: int = Field(default=20, gt=0, description="ids asked for at each position (openai)")
    key_variable: str | None = Field(default=None, description="environment variable that holds the API key")
    timeout: float = Field(default=60.0, gt=0, description="seconds that one request may take")
    patience: float = Field(default=600.0, ge=0, description="seconds that a run waits for a server that is gone")


def check_rows(recipe: Recipe) -> None:
    """A teacher with rows of its own (`tokens`, `visual`), and what can be compared with them. Raises ValueError."""
    teacher = recipe.teacher
    if teacher is None or not teacher.own_rows:
        return
    own = [f"{name}: {value}" for name in ("tokens", "visual") if (value := getattr(teacher, name)) != "same"]
    if teacher.kind != "local":
        raise ValueError(
            f"teacher.{own[0]} gives the teacher rows of its own, which a teacher of kind '{teacher.kind}' can't have "
            "yet: use kind: local"
        )
    if teacher.tokens == "aligned" and teacher.visual == "assignment":
        raise ValueError(
            "teacher.visual: assignment compares logits id by id, and with tokens: aligned an id means another token "
            "to the teacher: use visual: interpolate"
        )
    for stage in recipe.stages:
        if teacher.tokens == "aligned" and stage.loss.divergence != "forward_kl":
            raise ValueError(
                f"stage '{stage.name}': loss.divergence: {stage.loss.divergence} compares ids, and with tokens: "
                "aligned an id means another token to the teacher: leave it out (such rows are compared by universal "
                "logit distillation)"
            )
        if stage.loss.preference:
            raise ValueError(
                f"stage '{stage.name}' learns from preferences, whose reference gives log-probabilities of the "
                f"student's own rows: teacher.{own[0]} can't; train it in a recipe of its own"
            )
        if stage.loss.compares and "unshifted_mask" in stage.reference:
            raise ValueError(
                f"stage '{stage.name}': reference: [unshifted_mask] is of the student's own rows, and teacher.{own[0]} "
                "gives the teacher others: leave it out"
            )


def check_kept(recipe: Recipe) -> None:
    """A cached teacher, and what can be asked of what it keeps. Raises ValueError."""
    teacher = recipe.teacher
    if teacher is None or teacher.kind != "cached":
        return
    for stage in recipe.stages:
        if not stage.loss.compares:
            continue
        if recipe.pictures.augment is not None:
            raise ValueError(
                f"stage '{stage.name}' compares with a cached teacher, who has seen each picture once, and "
                "'pictures.augment' changes it at every showing: remove one of the two (teacher.kind: local sees what "
                "the student sees)"
            )
        if stage.loss.visual and teacher.keep.visual == "relation":
            raise ValueError(
                f"stage '{stage.name}' has loss.visual, and the cached teacher keeps relation matrices alone: set "
                "teacher.keep.visual: hidden, or loss.visual: 0"
            )
        if stage.loss.response and "unshifted_mask" in stage.reference:
            raise ValueError(
                f"stage '{stage.name}': reference: [unshifted_mask] compares rows behind the answers', which a cached "
                "teacher does not keep: leave it out, or set teacher.kind: local"
            )


def check_prompted(recipe: Recipe) -> None:
    """A teacher that says only what is likely behind a prompt, and what can be learned from that. Raises ValueError."""
    teacher = recipe.teacher
    if teacher is None or teacher.kind != "remote" or teacher.remote is None or teacher.remote.protocol != "openai":
        return
    for stage in recipe.stages:
        asked = [name for name in ("visual", "relation", "preference") if getattr(stage.loss, name)]
        if asked:
            raise ValueError(
                f"stage '{stage.name}' has loss.{asked[0]}, which needs hidden rows, and a teacher behind "
                "teacher.remote.protocol: openai gives log-probabilities of response rows alone: serve it with "
                "`distilvlm teach` (protocol: distilvlm), set teacher.kind to local or cached, or the weight to 0"
            )
        if stage.loss.response and "unshifted_mask" in stage.reference:
            raise ValueError(
                f"stage '{stage.name}': reference: [unshifted_mask] compares rows behind the answers', which a teacher "
                "behind teacher.remote.protocol: openai is not asked about: leave it out, or use protocol: distilvlm"
            )


def check_sparse(recipe: Recipe) -> None:
    """A teacher of which only some probabilities of the response rows are known, and what can be told from these.
    Raises ValueError."""
    teacher = recipe.teacher
    if teacher is None:
        return
    kept = f"teacher.keep.responses: {teacher.keep.responses}" if teacher.kind == "cached" else ""
    prompted = teacher.kind == "remote" and teacher.remote is not None and teacher.remote.protocol == "openai"
    known = "teacher.remote.protocol: openai" if prompted else kept
    if not known or (kept and teacher.keep.responses == "hidden"):
        return
    for stage in recipe.stages:
        loss = stage.loss
        if loss.response and (loss.temperature != 1 or "temperature" in loss.schedule):
            raise ValueError(
                f"stage '{stage.name}': loss.temperature needs all of the teacher's probabilities, and {known} gives "
                "some of them, at temperature 1: leave it out, or let the teacher give hidden rows"
            )
        if loss.response and kept and teacher.keep.responses == "sampled" and loss.divergence != "forward_kl":
            raise ValueError(
                f"stage '{stage.name}': ids that are drawn from the teacher ({known}) are right on average for "
                f"loss.divergence: forward_kl alone, not for {loss.divergence}: set it, or keep responses: top_k or "
                "hidden"
            )
