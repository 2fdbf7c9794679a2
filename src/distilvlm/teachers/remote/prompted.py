"""A teacher behind a server that gives log-probabilities of prompts: the likeliest ids of each position.

What a row of a batch predicts is what the server says of the position behind it. Prompts with pictures go as text,
which the server's own tokenizer reads, and so do all prompts of the first batch: only a server that reads them as this
run does, token by token, is one to learn from.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distilvlm.data.batch import Batch
from distilvlm.losses.sparse import Sparse
from distilvlm.models.vlm import VLM
from distilvlm.recipe.models import TeacherSpec
from distilvlm.teachers.interface import Targets, TeacherError

from .alignment import DRIFT, drift, require_aligned, require_blind
from .connection import Ask, Connection
from .dialects import DIALECTS, VLLM, Answer, Dialect, Prompt

logger = logging.getLogger(__name__)


class PromptedTeacher:
    """Response targets of a model behind vLLM or SGLang; it gives neither visual nor relation targets.

    A sample with pictures whose tokens cannot be told from its text (one that is cut within a character) gets no
    target: nothing is known of its rows, and their loss is 0. Such samples are named in the log.

    Args:
        spec: of the recipe, with `remote`.
        student: the student it teaches.
        student_device: where targets are brought.
        outline: the model that the recipe names, without weights, where its files are here.

    Raises:
        TeacherError: the server is away for longer than a run waits, refuses the key, or has no such model.
    """

    provides = frozenset({"teacher.responses"})
    shares_vision = False
    head = None
    view = None

    def __init__(
        self, spec: TeacherSpec, student: VLM, student_device: torch.device, outline: VLM | None = None
    ) -> None:
        assert spec.remote is not None  # the schema's rule
        assert student.tokenizer is not None  # only a plan may lack it
        self.student_device, self.vlm = student_device, outline
        self._wanted, self._top_k = spec.remote.model, spec.remote.top_k
        self._tokenizer: Any = student.tokenizer
        self._image_id = student.image_id
        self._placeholders, self._vocabulary = student.layout.placeholders, student.embedding_rows
        self._prefix = _prefix(student.tokenizer)
        self._untold: set[object] = set()
        self._dialect: Dialect = VLLM()
        self._model: dict[str, Any] | None = None
        self._probe: tuple[Prompt, Answer] | None = None
        self._connection = Connection(spec.remote, self._greet)
        self._url = self._connection.url
        self._connection.ask([])
        logger.info(
            "teacher %s at %s: the %d likeliest ids of each response row", self.identity, self._url, self._top_k
        )

    @property
    def identity(self) -> str:
        """What tells this teacher from other ones, as far as its server says it."""
        assert self._model is not None  # __init__ has greeted
        return f"{self._name} ({self._model.get('root') or 'unknown origin'})"

    def targets(self, batch: Batch, rows: Tensor, features: Tensor | None) -> Targets:
        """What the server knows of the batch's response rows; `rows` and `features` are of no use to it.

        Raises:
            TeacherError: the server reads a prompt as other tokens, or speaks of other positions.
        """
        batch, _ = batch.unpacked(batch.response_rows)  # a prompt is one sample
        wanted = batch.response_rows // batch.length  # [responses] the sample of each
        samples = wanted.unique().tolist()
        prompts = {sample: self._prompt(batch, sample) for sample in samples}
        told = {sample: prompt for sample, prompt in prompts.items() if prompt is not None}
        asks = [self._dialect.ask(prompt, self._name, self._top_k) for prompt in told.values()]
        replies = self._connection.ask(asks)
        answers: dict[int, Answer] = {}
        for (sample, prompt), reply in zip(told.items(), replies, strict=True):
            answers[sample] = self._checked(prompt, reply, self._is_picture(batch, sample)[: len(prompt.ids)].tolist())
        if self._probe is None and told:
            sample = next(iter(told))
            self._require_blind(told[sample].ids)
            self._probe = told[sample], answers[sample]
        positions = (batch.response_rows % batch.length + 1).tolist()
        known = [
            answers[sample].known[position] if sample in answers else {}
            for sample, position in zip(wanted.tolist(), positions, strict=True)
        ]
        return Targets(None, None, responses=self._sparse(known))

    @property
    def _name(self) -> str:
        assert self._model is not None
        return str(self._model["id"])

    def _prompt(self, batch: Batch, sample: int) -> Prompt | None:
        """A sample as the server is asked about it; None where only text would do and it has none."""
        length = int(batch.attention_mask[sample].sum())
        ids = batch.input_ids[sample, :length].cpu()
        pictures = None
        if batch.owners is not None and bool((batch.owners == sample).any()):
            if batch.pictures is None:
                raise TeacherError("a batch with kept features has no pictures for a teacher elsewhere")
            pictures = batch.pictures[batch.owners == sample]
        if pictures is None and self._probe is not None:
            return Prompt(ids.tolist(), None)
        text = self._text(ids, self._is_picture(batch, sample)[:length])
        if text is None and pictures is not None:
            self._tell(batch, sample)
            return None
        return Prompt(ids.tolist(), text, self._prefix, pictures)

    def _is_picture(self, batch: Batch, sample: int) -> Tensor:
        """[length] whether a position stands for a part of a picture."""
        flat = torch.zeros(batch.samples * batch.length, dtype=torch.bool)
        flat[batch.placeholder_rows.cpu()] = True
        return flat.view(batch.samples, batch.length)[sample]

    def _text(self, ids: Tensor, is_picture: Tensor) -> str | None:
        """A text that this run's tokenizer reads as `ids`, if there is one."""
        ids = torch.where(is_picture, self._image_id, ids)
        number = is_picture.cumsum(0) - 1  # of a placeholder among all
        shown = ids[~is_picture | (number % self._placeholders == 0)].tolist()  # one of each picture
        text = self._tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        read = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        return text if read.ids == shown else None

    def _tell(self, batch: Batch, sample: int) -> None:
        key = batch.keys[sample]
        if key not in self._untold:
            self._untold.add(key)
            logger.warning(
                "%s, row %d: its text is read as other tokens than it was cut to, so the teacher at %s is not asked "
                "about it (%d samples so far)",
                key.file,
                key.row,
                self._url,
                len(self._untold),
            )

    def _require_blind(self, ids: list[int]) -> None:
        """Ask about a prompt twice, the second time with another last token."""
        other = next((id for id in ids if id != ids[-1]), 0)
        prompts = Prompt(ids, None), Prompt([*ids[:-1], other], None)
        asks = [self._dialect.ask(prompt, self._name, self._top_k) for prompt in prompts]
        first, second = (self._read(reply) for reply in self._connection.ask(asks))
        require_blind(first, second, self._url)

    def _checked(self, prompt: Prompt, reply: bytes, is_picture: Sequence[bool]) -> Answer:
        answer = self._read(reply)
        require_aligned(prompt.ids, answer, is_picture, self._tokenizer, self._url)
        return answer

    def _read(self, reply: bytes) -> Answer:
        try:
            return self._dialect.answer(reply)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise TeacherError(
                f"{self._url} gives no log-probabilities of prompts with their token ids ({type(error).__name__}: "
                f"{error}): it must be vLLM 0.10.2 or later, SGLang 0.4.6 or later, or answer as they do"
            ) from None

    def _sparse(self, known: Sequence[dict[int, float]]) -> Sparse:
        """What is known of each row, likeliest first; ids that the student lacks are left to the tail."""
        kept = self._top_k + 1  # the token that stands there is among them, likely or not
        ids = torch.full((len(known), kept), -1)
        values = torch.full((len(known), kept), -math.inf)
        for row, entry in enumerate(known):
            ours = [(value, id) for id, value in entry.items() if id < self._vocabulary and value > -math.inf]
            for place, (value, id) in enumerate(sorted(ours, reverse=True)[:kept]):
                ids[row, place], values[row, place] = id, value
        return Sparse(ids.to(self.student_device), values.to(self.student_device), tail=True)

    def _greet(self) -> None:
        """Behind every outage: it must be the model that the run began with, as far as that can be seen."""
        (reply,) = self._connection.once([Ask("/v1/models")])
        try:
            models = {str(one["id"]): one for one in json.loads(reply)["data"]}
            model = models[self._wanted] if self._wanted else next(iter(models.values()))
        except (ValueError, KeyError, TypeError, StopIteration):
            wanted = self._wanted or "any model"
            raise TeacherError(
                f"{self._url} does not serve {wanted} (it answers {reply[:200]!r}): see teacher.remote.model, and give "
                "teacher.remote.url without /v1"
            ) from None
        if self._model is not None:
            self._require_same(self._model, model)
        self._model = model
        self._dialect = DIALECTS.get(str(model.get("owned_by")), VLLM)()
        if self._probe is not None:
            self._require_same_answer(*self._probe)

    def _require_same(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        names = [name for name in ("id", "root", "owned_by") if before.get(name) != now.get(name)]
        if names:
            changed = "; ".join(f"{name} {before.get(name)!r}, now {now.get(name)!r}" for name in names)
            raise _other(self._url, changed)

    def _require_same_answer(self, prompt: Prompt, before: Answer) -> None:
        """The first prompt of all is asked about again: a name says little about weights."""
        (reply,) = self._connection.once([self._dialect.ask(prompt, self._name, self._top_k)])
        now = self._read(reply)
        mean = drift(before.known, now.known)
        if now.ids != before.ids or mean >= DRIFT:
            raise _other(self._url, f"log-probabilities of one prompt differ by {mean:.2g} nats on average")


def _other(url: str, changed: str) -> TeacherError:
    return TeacherError(
        f"{url} came back as another model ({changed}): start the one that this run began with, and the same command "
        "goes on behind the last checkpoint"
    )


def _prefix(tokenizer: Any) -> str:
    """What the tokenizer puts before a text of its own accord, as text: BOS, or nothing."""
    bos = tokenizer.bos_token
    return bos if bos and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
