"""The engine over a model in this process: requests join and leave the batch between steps.

Between two steps those that are cancelled leave, then waiting ones are read into free places, one group at a time, so
that what is already running never waits for more than one group; then all rows together choose their next token.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Condition, Thread

import torch
from torch import Tensor

from distilvlm.models.onednn import faster_linear
from distilvlm.models.vlm import VLM

from .batch import Batch
from .interface import Busy, Draining, Failed, NotFinite, Piece, Refused, Request, ServedModel, TokenLogprob
from .sampling import choose, logprob
from .served import Prompt, Served
from .ticket import Answer
from .writing import Writer

log = logging.getLogger(__name__)

GROUP = 1024
"""Positions, padding included, that are read at once; a longer prompt is read alone."""

IDLE = 0.05
"""Seconds after which a drain looks again whether all is done."""


@dataclass(eq=False)
class Running:
    """A request, from the queue to its last token."""

    served: Served
    prompt: Prompt
    answer: Answer
    writer: Writer
    ends: frozenset[int]
    logprobs: int | None
    last: int = -1  # token
    tokens: int = 0
    began: float = 0.0


class LocalEngine:
    """An engine (`interface.Engine`) with a decoding thread. Make it with `loading.load`.

    Args:
        vlm: of which nobody else runs anything meanwhile.
        served: its workflows under their names.
        places: requests that are decoded together, at most.
        queue: requests that wait, at most.
    """

    def __init__(self, vlm: VLM, served: Sequence[Served], places: int = 16, queue: int = 64) -> None:
        vlm.train(False)
        self._served = {one.about.name: one for one in served}
        if len(self._served) < len(served):
            raise ValueError(f"two models are called alike: {', '.join(one.about.name for one in served)}")
        self._places, self._bound = places, queue
        self._vlm = vlm
        self._tokenizer = copy.deepcopy(vlm.tokenizer)  # the thread's own, which `submit` never touches
        self._batch = Batch(vlm)
        self._rows: list[Running] = []  # of the batch
        self._reading: list[Running] = []
        self._waiting: deque[Running] = deque()
        self._counts: Counter[str] = Counter()
        self._seconds = 1.0  # that a request is in the batch, lately
        self._draining = self._stopped = False
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    @property
    def models(self) -> tuple[ServedModel, ...]:
        return tuple(one.about for one in self._served.values())

    def submit(self, request: Request) -> Answer:
        """Queue a request. Arguments and errors as `interface.Engine.submit`."""
        served = self._served.get(request.model)
        if served is None:
            raise Refused("model", f"'{request.model}' is not served: there is {', '.join(self._served)}")
        with self._changed:
            self._require_room()  # before its pictures are worked on
        prompt = served.prompt(request)
        with self._changed:
            self._require_room()
            running = Running(
                served,
                prompt,
                Answer(prompt.length, self._forget),
                Writer(self._tokenizer, request.stop),
                served.text_ends if request.prompt is not None else served.turn_ends,
                request.logprobs,
            )
            self._waiting.append(running)
            self._counts["requests"] += 1
            self._changed.notify_all()
        return running.answer

    def drain(self, seconds: float) -> None:
        """Finish what is here, and stop. Arguments as `interface.Engine.drain`."""
        until = time.monotonic() + seconds
        with self._changed:
            self._draining = True
            while (self._rows or self._reading or self._waiting) and (left := until - time.monotonic()) > 0:
                self._changed.wait(min(left, IDLE))
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def numbers(self) -> Mapping[str, float]:
        with self._changed:
            counts = {f"{name}_total": float(self._counts[name]) for name in COUNTED}
            return counts | {
                "queue": float(len(self._waiting)),
                "queue_limit": float(self._bound),
                "running": float(len(self._rows) + len(self._reading)),
                "places": float(self._places),
                "key_value_bytes": float(self._batch.bytes),
            }

    def _require_room(self) -> None:
        if self._draining:
            raise Draining()
        free = self._places - len(self._rows) - len(self._reading)  # who will have one of these does not wait
        if len(self._waiting) >= self._bound + free:
            self._counts["busy"] += 1
            raise Busy(max(1.0, self._seconds * len(self._waiting) / self._places))

    def _forget(self) -> None:
        """A request was cancelled: one that waits makes room at once, one that runs before the next step."""
        with self._changed:
            kept = deque(running for running in self._waiting if not running.answer.over)
            self._counts["cancelled"] += 1
            self._waiting = kept
            self._changed.notify_all()

    # What follows runs in the decoding thread.

    @torch.inference_mode()
    def _run(self) -> None:
        with faster_linear(self._vlm):
            self._decode()

    def _decode(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._rows or self._waiting or self._stopped)
                if self._stopped:
                    break
            try:
                self._leave([running for running in self._rows if running.answer.over])
                self._join()
                self._step()
            except Exception as error:  # of the whole batch: whose fault it is can't be told
                log.exception("a step failed")
                self._fail([*self._rows, *self._reading], f"decoding failed ({type(error).__name__}: {error})")
                self._batch = Batch(self._vlm)
                with self._changed:
                    self._rows, self._reading = [], []
        with self._changed:
            left = [*self._rows, *self._waiting]
            self._rows, self._waiting = [], deque()
        self._fail(left, "the server was stopped before this was answered")

    def _join(self) -> None:
        """Read the longest group at the head of the queue that fits."""
        with self._changed:
            group = self._reading = []
            while self._waiting and len(self._rows) + len(group) < self._places:
                longest = max(running.prompt.length for running in [*group, self._waiting[0]])
                if group and longest * (len(group) + 1) > GROUP:
                    break
                group.append(self._waiting.popleft())
        if group:
            self._read(group)
        self._reading = []

    def _read(self, group: Sequence[Running]) -> None:
        try:
            read = self._batch.read([one.prompt for one in group], [one.served.workflow for one in group])
        except Exception as error:
            if len(group) > 1:
                for running in group:  # each alone, so that none fails for another's sake
                    self._read([running])
                return
            log.exception("a prompt for '%s' could not be read", group[0].served.about.name)
            self._fail(group, f"the prompt could not be read ({type(error).__name__}: {error})")
            return
        self._batch.join(read)
        with self._changed:  # at once, or they would take two places each
            self._rows = [*self._rows, *group]
            self._reading = [running for running in self._reading if running not in group]
        for running in group:
            running.began = time.monotonic()
            self._counts["prompt_tokens"] += running.prompt.length
            if running.prompt.echo is not None:
                running.answer.put(self._repeated(running, running.prompt.echo))
        self._advance(group, read.logits)

    def _repeated(self, running: Running, text: str) -> Piece:
        """The prompt, and where that is wanted what the model thought of its tokens."""
        if running.logprobs is None:
            return Piece(text, (), None, None)
        first, *later = running.prompt.encoded.input_ids.tolist()
        told = [TokenLogprob(running.writer.alone(first), first, None, ())]
        expected = self._batch.known(running.prompt, running.served.workflow)
        for token, logits in zip(later, expected, strict=True):
            told.append(logprob(logits, token, running.logprobs, running.writer.alone))
        return Piece(text, (), tuple(told), None)

    def _step(self) -> None:
        if self._rows:
            logits = self._batch.step([running.last for running in self._rows])
            self._counts["steps"] += 1
            self._advance(self._rows, logits)

    def _advance(self, rows: Sequence[Running], logits: Tensor) -> None:
        """Choose the next token of each row, [rows, V], tell it, and let go whoever is finished."""
        finite = logits.amax(dim=-1).isfinite()  # one NaN makes the maximum one
        leaving = [running for running, fine in zip(rows, finite.tolist(), strict=True) if not fine]
        if leaving:
            reason = "the model's numbers for this prompt are not finite (NaN): it can't be answered"
            self._fail(leaving, reason, NotFinite)
            rows, logits = [running for running in rows if running not in leaving], logits[finite]
        chosen = choose(logits, [running.prompt.draw for running in rows])
        for running, token, row in zip(rows, chosen, logits, strict=True):
            try:
                piece = self._piece(running, token, row)
            except Exception as error:
                log.exception("a token for '%s' could not be told", running.served.about.name)
                self._fail([running], f"token {token} could not be told ({type(error).__name__}: {error})")
                leaving.append(running)
                continue
            if running.answer.put(piece) and piece.finish is not None:
                self._counts["finished"] += 1
                self._seconds += (time.monotonic() - running.began - self._seconds) / 8
                leaving.append(running)
        self._leave(leaving)

    def _piece(self, running: Running, token: int, logits: Tensor) -> Piece:
        nothing = None if running.logprobs is None else ()
        if token in running.ends:
            return Piece(running.writer.rest(), (), nothing, "stop")
        running.last = token
        running.tokens += 1
        self._counts["tokens"] += 1
        known = nothing
        if running.logprobs is not None:
            known = (logprob(logits, token, running.logprobs, running.writer.alone),)
        text = running.writer.add(token)
        if running.writer.stopped:
            return Piece(text, (token,), known, "stop")
        if running.tokens == running.prompt.limit:
            text += running.writer.rest()
            return Piece(text, (token,), known, "stop" if running.writer.stopped else "length")
        return Piece(text, (token,), known, None)

    def _leave(self, leaving: Sequence[Running]) -> None:
        if not leaving:
            return
        order = self._batch.leave([row for row, running in enumerate(self._rows) if running in leaving])
        with self._changed:
            self._rows = [self._rows[row] for row in order]
            self._changed.notify_all()

    def _fail(self, rows: Sequence[Running], reason: str, kind: type[Failed] = Failed) -> None:
        for running in rows:
            if not running.answer.over:
                self._counts["failed"] += 1
                running.answer.fail(kind(reason))


COUNTED = ("requests", "finished", "failed", "cancelled", "busy", "tokens", "prompt_tokens", "steps")
"""What is counted since the start; `NAME_total` of `numbers`."""
