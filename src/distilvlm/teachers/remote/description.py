"""What a served model is: said by the server, compared with the student and the recipe before anything is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from distilvlm.models import forward, parts
from distilvlm.models.fingerprint import fingerprint
from distilvlm.models.quantised import bits_of
from distilvlm.models.vlm import VLM, VisionLayout
from distilvlm.teachers.interface import TeacherError
from distilvlm.teachers.local import meanings

PROTOCOL = 1
"""Of questions and answers; a server and a run of other numbers do not understand each other."""

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Description:
    """A model behind `distilvlm teach`."""

    fingerprint: str  # of its weights in the dtype that they are held in
    precision: str  # as teacher.precision of recipes
    vocabulary: int  # rows of its head
    width: int  # of its hidden rows
    meanings: str  # hash of what its tokenizer's ids mean
    layout: VisionLayout
    largest: int  # bytes of a request
    protocol: int = PROTOCOL

    @classmethod
    def of(cls, vlm: VLM, largest: int) -> Description:
        head = forward.head_weight(vlm.model)
        return cls(
            fingerprint=fingerprint(vlm.model, beside=parts.beside(vlm.model)),
            precision=bits_of(vlm) or NAMES[head.dtype],
            vocabulary=head.shape[0],
            width=head.shape[1],
            meanings=digest(meanings(vlm)),
            layout=vlm.layout,
            largest=largest,
        )

    @classmethod
    def read(cls, models: bytes, url: str) -> tuple[str, Description]:
        """The name and the description of the model that an answer to `GET /v1/models` tells of.

        Raises:
            TeacherError: it is not an answer of `distilvlm teach`, or of another version of it.
        """
        try:
            (model,) = json.loads(models)["data"]
            facts: dict[str, Any] = model["distilvlm"]
            spoken = facts["protocol"]
        except (ValueError, KeyError, TypeError):
            raise TeacherError(
                f"{url} is no server of `distilvlm teach`: set teacher.remote.protocol to openai if it serves "
                "log-probabilities of prompts (vLLM, SGLang)"
            ) from None
        if spoken != PROTOCOL:
            raise TeacherError(
                f"{url} speaks version {spoken} of the protocol, and this run {PROTOCOL}: install the same distilvlm "
                "on both machines"
            )
        layout: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in facts.pop("layout").items()
        }
        return str(model["id"]), cls(**facts, layout=VisionLayout(**layout))

    def as_models(self, name: str) -> dict[str, Any]:
        """The answer to `GET /v1/models`."""
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "owned_by": "distilvlm", "distilvlm": asdict(self)}],
        }

    def require_precision(self, wanted: str, url: str) -> None:
        """Raises `TeacherError` where the recipe wants weights of another precision than are served."""
        if wanted != self.precision:
            raise TeacherError(
                f"the recipe's teacher.precision is {wanted}, and {url} holds its weights in {self.precision}: set "
                f"teacher.precision to {self.precision}, or start the server with --precision {wanted}"
            )

    def require_model(self, outline: VLM, url: str) -> None:
        """Raises `TeacherError` where the recipe names a model of another form. Weights can't be told without them."""
        vocabulary, width = forward.head_weight(outline.model).shape
        named = {"vocabulary": vocabulary, "width": width, "layout": outline.layout}
        for name, value in named.items():
            if getattr(self, name) != value:
                raise TeacherError(
                    f"the recipe's teacher has {name} {value}, and the model at {url} {getattr(self, name)}: name the "
                    "model that is served, or serve the one that is named"
                )

    def require_same(self, before: Description, url: str) -> None:
        """Raises `TeacherError` where the server is not what it was before an outage."""
        differing = [
            f"{name} {getattr(before, name)!r}, now {value!r}"
            for name, value in vars(self).items()
            if name != "largest" and value != getattr(before, name)
        ]
        if differing:
            raise TeacherError(
                f"{url} came back as another model ({'; '.join(differing)}): start the one that this run began with, "
                "and the same command goes on behind the last checkpoint"
            )


def digest(meant: Mapping[int, str]) -> str:
    """Hash of a tokenizer's ids and their tokens."""
    return hashlib.sha256(json.dumps(sorted(meant.items())).encode()).hexdigest()
