"""The sections that distil vision encoders into one (MoVE-KD): its teachers, what is kept of them, how they are
compared with the student, and the mixture of experts that the student gets."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from distilvlm.recipe.section import Section

ANCHOR = "anchor"
"""The teacher that the student itself was: with `from` left out, a frozen copy of its initial weights."""


class EncoderSpec(Section):
    """A frozen vision encoder that gives features: any ViT, CNN or SAM of transformers or timm."""

    source: str | None = Field(
        default=None, alias="from", description="directory or hub id; a timm model's name; the anchor may leave it out"
    )
    config: dict[str, Any] | None = Field(
        default=None, description="architecture of a randomly initialised encoder instead (tests, and controls)"
    )
    backend: Literal["auto", "transformers", "timm"] = Field(
        default="auto", description="auto: what the directory says; for a hub id, transformers"
    )
    size: int | None = Field(default=None, gt=0, description="picture side in pixels; default: the checkpoint's own")
    layer: int | None = Field(
        default=None,
        description="of a ViT the hidden state that is read (default -2, the anchor the student's); of a CNN the stage "
        "(default: the last)",
    )
    pool: int | None = Field(
        default=None, gt=0, description="tokens are averaged to so many a side before they are kept or compared"
    )
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="what its weights are held in")
    layout: Literal["true", "reference"] = Field(
        default="true",
        description="of SAM's tokens; reference: scrambled as in the method's code, which took channels for rows",
    )


class CacheSpec(Section):
    """Where features of the encoders are kept, computed once per picture (`distilvlm cache RECIPE` fills it)."""

    path: str
    precision: Literal["bf16", "fp32"] = Field(default="bf16", description="what they are kept in")


class ComparisonSpec(Section):
    """How a stage compares the student with its encoders: a preset, and what of it is changed.

    A field left out is the preset's; `losses/encoder.py` has the table. `paper`: as the paper's formulas.
    `reference-v1.0` and `-v1.1`: what the released code computes (v1.1 has SAM as a further teacher, no other rule).
    """

    preset: Literal["paper", "reference-v1.0", "reference-v1.1"] = "paper"
    teachers: list[str] | None = Field(default=None, min_length=1, description="of `encoders`; default: all of them")
    importance: str | None = Field(
        default=None, description="the encoder whose attention weighs tokens and teachers; default: the anchor"
    )
    token_weights: Literal["paper", "reference", "none"] | None = None
    teacher_weights: Literal["paper", "reference", "none"] | None = Field(
        default=None, description="paper: softmax of scores / √d; reference: without √d, flattened; none: equal"
    )
    anchor_weight: float | None = Field(
        default=None, ge=0, le=1, description="the anchor's fixed share; the other teachers divide the rest (0.8)"
    )
    detach: bool | None = Field(default=None, description="no gradient through the teachers' weights (code: not so)")
    adapter: Literal["token_mixer", "interpolate"] | None = Field(
        default=None, description="token_mixer: the method's, for one grid; interpolate: resized, then an MLP"
    )
    side: Literal["teacher", "student"] | None = Field(
        default=None, description="teacher: its tokens are mapped (the method); student: its own are, the target stays"
    )
    standardise: bool | None = Field(
        default=None, description="targets of every teacher centred and rotated to equal variances (PHI-S)"
    )


class Mix(Section):
    """Give the vision tower's feed-forwards a mixture of LoRA experts with one router per layer (MoVE-KD)."""

    do: Literal["mix"]
    experts: int = Field(default=3, ge=1, description="1: no router; merges into stock weights when the run ends")
    rank: int = Field(default=32, ge=1)
    alpha: float = Field(default=1.0, gt=0, description="what an expert adds is scaled by alpha / rank")
    dropout: float = Field(default=0.05, ge=0, lt=1, description="on what enters an expert's matrices, in training")
    start: Literal["zero", "kaiming"] = Field(
        default="zero",
        description="zero: the student starts as it was; kaiming: as the method, which differs from it at once",
    )
    routing: Literal["top1", "top1_scaled", "dense"] = Field(
        default="top1", description="top1: unscaled, as the method; only loss.expert_balance then moves routers"
    )
    bias: bool = Field(default=True, description="biases on the experts' matrices (code: yes)")
    layers: Literal["read"] | list[int] = Field(default="read", description="read: every layer that the features need")

    @model_validator(mode="after")
    def _dense_needs_experts(self) -> Mix:
        if self.experts == 1 and self.routing != "top1":
            raise ValueError(f"routing '{self.routing}' of one expert: leave routing out, nothing is chosen")
        return self

    def __str__(self) -> str:
        layers = "the read" if self.layers == "read" else ", ".join(map(str, self.layers))
        count = f"{self.experts} experts" if self.experts > 1 else "1 expert"
        return f"mix {count} of rank {self.rank} into {layers} vision layers"
