"""A teacher behind `distilvlm teach`: exact targets from another process or another machine."""

from __future__ import annotations

import json
import logging
from urllib.parse import urlencode

import torch
from torch import Tensor

from distilvlm.data.batch import Batch
from distilvlm.models.vlm import VLM
from distilvlm.recipe.models import TeacherSpec
from distilvlm.teachers.interface import Targets, TeacherError
from distilvlm.teachers.local import meanings, require_same_meanings, require_same_visual_tokens

from .connection import Ask, Connection
from .description import Description, digest
from .message import KIND, Question, unpack

logger = logging.getLogger(__name__)


class RemoteTeacher:
    """Hidden rows of a model elsewhere, the same as it would give here.

    Products are made in what the run's own are made in (`machine.precision`); fp32 rows come as fp32.

    Args:
        spec: of the recipe, with `remote`.
        student: the student it teaches; the two must share a tokenizer and the number of visual tokens.
        student_device: where targets are brought.
        outline: the model that the recipe names, without weights, where its files are here.

    Raises:
        TeacherError: the server is away for longer than a run waits, refuses the key, or holds a model that cannot
            teach this student.
    """

    provides = frozenset({"teacher.responses", "teacher.visual", "teacher.relation"})
    shares_vision = False
    view = None

    def __init__(
        self, spec: TeacherSpec, student: VLM, student_device: torch.device, outline: VLM | None = None
    ) -> None:
        assert spec.remote is not None  # the schema's rule
        self.student_device, self.vlm = student_device, outline
        self._described: Description | None = None
        self._connection = Connection(spec.remote, self._greet)
        self._url = self._connection.url
        self.name, self.description = Description.read(self._ask(Ask("/v1/models")), self._url)
        self.description.require_precision(spec.precision, self._url)
        if outline is not None:
            self.description.require_model(outline, self._url)
        self._require_fits(student)
        self.head = self._fetch_head()  # [vocab_teacher, d_teacher]
        logger.info("teacher %s at %s: %s, weights in %s", self.name, self._url, self.identity, spec.precision)

    @property
    def identity(self) -> str:
        """What tells this teacher from every other one."""
        return self.description.fingerprint

    def targets(self, batch: Batch, rows: Tensor, features: Tensor | None) -> Targets:
        """As every teacher's; `features` are not used, since the model elsewhere has a tower of its own."""
        hidden = self._rows(batch, rows).to(self.student_device)
        return Targets(hidden, self.head)

    def _rows(self, batch: Batch, rows: Tensor) -> Tensor:
        bf16 = torch.is_autocast_enabled(batch.input_ids.device.type)
        body = Question.of(batch, rows).pack()
        if len(body) > self.description.largest:
            raise TeacherError(
                f"a micro-batch takes {len(body):,} bytes, and {self._url} accepts {self.description.largest:,}: set "
                "machine.micro_batch to less, or start the server with a greater --largest"
            )
        query = urlencode({"model": self.identity, "products": "bf16" if bf16 else "fp32"})
        answer = self._ask(Ask(f"/v1/hidden?{query}", body, KIND))
        return self._tensor(answer, "hidden", (rows.numel(), self.description.width))

    def _fetch_head(self) -> Tensor:
        answer = self._ask(Ask("/v1/head"))
        shape = (self.description.vocabulary, self.description.width)
        return self._tensor(answer, "head", shape).to(self.student_device)

    def _ask(self, ask: Ask) -> bytes:
        return self._connection.ask([ask])[0]

    def _tensor(self, answer: bytes, name: str, shape: tuple[int, int]) -> Tensor:
        tensor = unpack(answer).get(name)
        if tensor is None or tuple(tensor.shape) != shape:
            found = "missing" if tensor is None else list(tensor.shape)
            raise TeacherError(f"the {name} that {self._url} sent is {found}, not {list(shape)}")
        return tensor

    def _greet(self) -> None:
        """Behind every outage: it must be the model that the run began with."""
        (answer,) = self._connection.once([Ask("/v1/models")])
        _, described = Description.read(answer, self._url)
        if self._described is not None:
            described.require_same(self._described, self._url)
        self._described = described

    def _require_fits(self, student: VLM) -> None:
        require_same_visual_tokens(self.description.layout, student.layout)
        ours = meanings(student)
        if digest(ours) != self.description.meanings:
            theirs = json.loads(self._ask(Ask("/v1/vocabulary")))
            require_same_meanings(ours, {int(id): token for id, token in theirs.items()})
            raise TeacherError(f"{self._url} says that its tokenizer is another one than the one it gives")
