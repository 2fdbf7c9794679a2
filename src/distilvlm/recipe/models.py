"""The models of a recipe: the student, composed of parts or read as a whole, and its teacher."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from distilvlm.recipe.section import Section
from distilvlm.recipe.teachers import KeepSpec, RemoteSpec


class VisionSpec(Section):
    """The vision tower: any transformers ViT with patch tokens (CLIP, SigLIP, DINOv2, ...)."""

    source: str | None = Field(default=None, alias="from", description="directory or hub id of the pretrained encoder")
    config: dict[str, Any] | None = Field(
        default=None, description="architecture of a randomly initialised encoder instead"
    )
    size: int | None = Field(default=None, gt=0, description="picture side in pixels; default: the checkpoint's own")
    layer: int = Field(
        default=-2, description="hidden state that is read; -2 is LLaVA's (output of the last but one block)"
    )
    select: Literal["patches", "default", "full"] = Field(
        default="patches",
        description="'patches': every real patch and nothing else where the stock class can do so. 'default' / 'full': "
        "LLaVA's own strategies; 'default' drops index 0 even of a tower without CLS (the published 728 of 729)",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> VisionSpec:
        if (self.source is None) == (self.config is None):
            raise ValueError("give exactly one of 'from' (pretrained) and 'config' (random initialisation)")
        return self


class LanguageSpec(Section):
    """The language model: any causal LM whose stock class LLaVA can hold (Llama/SmolLM2, Qwen2, Qwen3, ...)."""

    source: str | None = Field(
        default=None, alias="from", description="directory or hub id of the pretrained language model"
    )
    config: dict[str, Any] | None = Field(
        default=None, description="architecture of a randomly initialised language model"
    )
    tokenizer: str | None = Field(default=None, description="directory or hub id; default: the language model's own")
    layers: int | list[int] | None = Field(
        default=None, description="cut to these layers; a number N keeps N evenly spaced ones, first and last included"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> LanguageSpec:
        if (self.source is None) == (self.config is None):
            raise ValueError("give exactly one of 'from' (pretrained) and 'config' (random initialisation)")
        if self.source is None and self.tokenizer is None:
            raise ValueError("a language model made from 'config' needs 'tokenizer'")
        return self


class ProjectorSpec(Section):
    """LLaVA-1.5's two-layer MLP between the vision encoder and the language model."""

    activation: str = "gelu"
    init_std: float = Field(
        default=0.02, gt=0, description="LLaVA-1.5 / TinyLLaVA Factory initialise with N(0, 0.02), bias 0"
    )


class ModelSpec(Section):
    """A vision-language model: an existing LLaVA-style checkpoint (`from`), or one composed of parts. A student may
    also be a vision encoder alone (`vision` without `language`)."""

    source: str | None = Field(
        default=None, alias="from", description="directory or hub id of a LLaVA-style checkpoint, or of adaptors"
    )
    workflow: str | None = Field(
        default=None, description="of a directory of adaptors: the one that is active; default: the last inserted"
    )
    vision: VisionSpec | None = None
    language: LanguageSpec | None = None
    projector: ProjectorSpec = ProjectorSpec()

    @property
    def encoder_alone(self) -> bool:
        return self.vision is not None and self.language is None

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSpec:
        if (self.source is None) == (self.vision is None) or (self.source and self.language):
            raise ValueError(
                "give either 'from' (a whole checkpoint) or both 'vision' and 'language' (composed); 'vision' alone is "
                "a student that is an encoder"
            )
        if self.workflow is not None and self.source is None:
            raise ValueError("'workflow' is of a directory of adaptors ('from'): a composed model has none yet")
        return self


class TeacherSpec(ModelSpec):
    """A teacher is a model that gives targets; it never trains.

    `kind` says where its targets come from, and changes nothing else of a recipe.
    """

    kind: Literal["local", "cached", "remote"] = Field(
        default="local", description="local: in this process; cached: computed once and kept on disk; remote: a server"
    )
    tokens: Literal["same", "aligned"] = Field(
        default="same",
        description="aligned: it may have another tokenizer; answers are compared where tokens of both begin at the "
        "same character, by universal logit distillation (arXiv 2402.12030)",
    )
    visual: Literal["same", "interpolate", "assignment"] = Field(
        default="same",
        description="a picture may be other tokens to it than to the student. interpolate: its visual rows are "
        "averaged over areas to the student's grid; assignment: each of the student's gets the nearest one (EM-KD)",
    )
    precision: Literal["fp32", "bf16", "8bit", "4bit"] = Field(
        default="fp32",
        description="what its weights are held in. 8bit (LLM.int8), 4bit (NF4): matrices of the language model's "
        "layers, all else in bf16 (`distilvlm[quantised]`)",
    )
    device: str | None = Field(default=None, description="'cpu', 'cuda:1', ...; default: the student's device")
    keep: KeepSpec = KeepSpec()
    remote: RemoteSpec | None = None

    @model_validator(mode="after")
    def _has_language(self) -> TeacherSpec:
        if self.encoder_alone:
            raise ValueError("a vision encoder alone gives features, not answers: name it in 'encoders'")
        return self

    @property
    def held(self) -> Literal["fp32", "bf16"]:
        """What its head and hidden rows are in."""
        return "fp32" if self.precision == "fp32" else "bf16"

    @property
    def bits(self) -> Literal["8bit", "4bit"] | None:
        """How the matrices of its language model's layers are quantised, if they are."""
        return self.precision if self.precision in ("8bit", "4bit") else None

    @property
    def own_rows(self) -> bool:
        """Whether it may read other rows than the student."""
        return (self.tokens, self.visual) != ("same", "same")

    @model_validator(mode="after")
    def _names_its_server(self) -> TeacherSpec:
        if self.kind == "remote" and self.remote is None:
            raise ValueError("a remote teacher needs the address of its server: remote: {url: http://HOST:PORT}")
        return self
