"""What a stage may do to the student before it trains. A new method adds a class here and its code in `models/`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distilvlm.recipe.encoders import Mix
from distilvlm.recipe.section import Section

TEXT = "text"
"""The workflow of a model with adaptors in which none of them is active."""


class Reset(Section):
    """Put parts of the student back to the weights they had before the first stage (LLaVA-KD's fine-tuning does)."""

    do: Literal["reset"]
    parts: list[str] = Field(min_length=1)

    def __str__(self) -> str:
        return f"reset {', '.join(self.parts)}"


class Upcycle(Section):
    """Make feed-forwards sparse: each becomes several experts that are copies of it, and a router (LLaVA-MoD)."""

    do: Literal["upcycle"]
    experts: int = Field(default=4, ge=2, description="copies of a layer's feed-forward")
    top_k: int = Field(
        default=2, ge=1, description="experts that serve a token; with 1, nothing but loss.balance moves the router"
    )
    layers: Literal["even", "odd", "first_half", "second_half", "all"] | list[int] = Field(
        default="even", description="which layers become sparse; even: every second one, from layer 0"
    )
    second_expert: Literal["argmax", "gumbel"] = Field(
        default="argmax", description="gumbel: later choices are drawn by their probability, in training only"
    )
    capacity: float | None = Field(
        default=None, gt=0, description="a training batch's tokens per expert, as a factor of an even share; more drop"
    )

    @model_validator(mode="after")
    def _enough_experts(self) -> Upcycle:
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k}, but there are only {self.experts} experts")
        return self

    def __str__(self) -> str:
        layers = self.layers if isinstance(self.layers, str) else ", ".join(map(str, self.layers))
        return f"upcycle {layers} layers: {self.experts} experts, {self.top_k} active"


class Insert(Section):
    """Insert an adaptor into the language model, which stays frozen from here on (IAA): further layers behind some of
    its own, and an embedding, final norm, head and projector of their own, used under a name of their own."""

    do: Literal["insert"]
    adaptor: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="its name, which is its workflow's")
    layers: int | Literal["iaa-14"] | list[int] = Field(
        description="how many, evenly spaced, the last among them (published: 8 and 14 of 32); iaa-14: the published "
        "places; or the numbers of the layers that they stand behind, from 0"
    )
    structure: Literal["a", "b", "c"] = Field(
        default="c",
        description="c: behind its frozen layer, in its path (the final one); b: beside it, gated; a: b, each inserted "
        "layer reading the one before (ControlNet's way)",
    )
    gate: Literal["linear", "scalar"] = Field(
        default="linear", description="of a and b, zero at first; unpublished, ControlNet's is linear"
    )
    start: str = Field(default="base", description="base: copies of the frozen layers; or an earlier adaptor's name")
    embedding: bool = Field(default=True, description="an embedding of its own")
    norm: bool = Field(default=True, description="a final norm of its own (in the code, not in the paper)")
    head: bool = Field(default=True, description="an output head of its own")
    projector: bool = Field(default=True, description="a projector of its own, a copy of the student's to begin with")
    tied: bool | None = Field(default=None, description="own embedding and head are one; default: as the base's are")

    @model_validator(mode="after")
    def _a_workflow_of_its_own(self) -> Insert:
        if self.adaptor in (TEXT, "base"):
            raise ValueError(f"'{self.adaptor}' is the frozen model without adaptors: call the adaptor otherwise")
        return self

    def __str__(self) -> str:
        layers = self.layers
        told = ", ".join(map(str, layers)) if isinstance(layers, list) else str(layers)
        many = f"{told} layers" if isinstance(layers, int) else f"layers behind {told}"
        gate = "" if self.structure == "c" else f", {self.gate} gate"
        begun = "" if self.start == "base" else f", from '{self.start}'"
        return f"insert adaptor '{self.adaptor}': {many}, structure ({self.structure}){gate}{begun}"


Transform = Annotated[Reset | Upcycle | Insert | Mix, Field(discriminator="do")]
"""One thing that is done to a student; `do` says which."""
