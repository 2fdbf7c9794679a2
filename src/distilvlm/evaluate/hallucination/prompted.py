"""A language model as judge: what it is asked, what it said, and that nothing is paid for twice.

What it said is kept answer by answer, so that a judging that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from distilvlm.evaluate.hallucination.endpoint import Endpoint, JudgeError
from distilvlm.evaluate.hallucination.judges import Case, Judge, Judgement, rating_of
from distilvlm.models.files import write_whole

_PLACE = re.compile(r"\{(?:question|answer|contents|reference)\}")


@dataclass(frozen=True)
class Prompted:
    """A judge that is asked by a prompt and whose reply is read.

    Args:
        prompt: with {question} and {answer}, and {contents} and {reference} where it wants them. Other braces stay.
        read: the reply → a judgement.
    """

    endpoint: Endpoint
    prompt: str
    read: Callable[[str], Judgement]

    @property
    def name(self) -> str:
        return self.endpoint.model

    def __call__(self, case: Case) -> Judgement:
        return self.read(self.endpoint.ask(self.filled(case)))

    def filled(self, case: Case) -> str:
        values = {
            "{question}": case.question,
            "{answer}": case.answer,
            "{contents}": ", ".join(case.contents) or "not known",
            "{reference}": case.reference or "not known",
        }
        # One pass, so that nothing is filled into what was filled in: an answer may hold "{question}".
        return _PLACE.sub(lambda found: values[found.group()], self.prompt)


def rater(endpoint: Endpoint, prompt: str | None = None) -> Prompted:
    """MMHal-Bench's question to a judge: how informative, and does it hallucinate? 0 to 6."""
    return Prompted(endpoint, prompt or default_prompt("rate"), rating_of)


def namer(endpoint: Endpoint, prompt: str | None = None) -> Prompted:
    """Object HalBench's question to a judge: which objects does the answer name?"""
    return Prompted(endpoint, prompt or default_prompt("name"), objects_of)


def default_prompt(name: str) -> str:
    """Ours: "rate" or "name"; they lie in `prompts/`."""
    return (files("distilvlm.evaluate.hallucination") / "prompts" / f"{name}.txt").read_text(encoding="utf-8")


def objects_of(text: str) -> Judgement:
    """The JSON list in a judge's words: the last one that is a list of strings; undecided without any."""
    decode = json.JSONDecoder().raw_decode
    found: list[str] | None = None
    for place in (number for number, character in enumerate(text) if character == "["):
        try:
            value, _ = decode(text, place)
        except ValueError:
            continue
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            found = value
    return Judgement(objects=None if found is None else tuple(found), text=text)


def judged(
    cases: Sequence[Case],
    judge: Judge,
    kept: str | Path | None = None,
    workers: int = 4,
    progress: Callable[[int, int], object] | None = None,
) -> list[Judgement]:
    """The judgement of every case, in order; a language model's are kept.

    Args:
        kept: JSONL file of the judgements, written whole after each; those of the same judge, prompt and answer that it
            holds are not asked for again.
        workers: so many are asked at the same time.

    Raises:
        JudgeError: as the judge; what it said before is kept.
    """
    if not isinstance(judge, Prompted):
        return [judge(case) for case in cases]
    known = _kept(kept)
    keys = [_key(judge, case) for case in cases]
    found = {key: known[key] for key in keys if key in known}
    waiting = {key: case for key, case in zip(keys, cases, strict=True) if key not in found}
    lock = threading.Lock()

    def one(key: str, case: Case) -> None:
        judgement = judge(case)
        with lock:
            found[key] = judgement
            if kept is not None:
                _write(kept, judge, [(k, c, found[k]) for k, c in zip(keys, cases, strict=True) if k in found])

    with ThreadPoolExecutor(max(1, workers)) as threads:
        futures = [threads.submit(one, key, case) for key, case in waiting.items()]
        try:
            for done, future in enumerate(as_completed(futures), start=len(cases) - len(waiting) + 1):
                future.result()
                if progress is not None:
                    progress(done, len(cases))
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return [found[key] for key in keys]


def _key(judge: Prompted, case: Case) -> str:
    """All that a judgement depends on."""
    return hashlib.sha256(f"{judge.name}\n{judge.filled(case)}".encode()).hexdigest()[:32]


def _kept(path: str | Path | None) -> dict[str, Judgement]:
    if path is None or not Path(path).exists():
        return {}
    found: dict[str, Judgement] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n"), start=1):
        try:
            row: Mapping[str, Any] = json.loads(line)
            objects = None if row["objects"] is None else tuple(row["objects"])
            found[row["key"]] = Judgement(row["rating"], row["hallucinated"], objects, row["text"])
        except (ValueError, TypeError, KeyError) as error:
            raise JudgeError(f"{path}, line {number} is no kept judgement ({error}): remove the file") from None
    return found


def _write(path: str | Path, judge: Prompted, rows: Sequence[tuple[str, Case, Judgement]]) -> None:
    lines = (
        {
            "row": case.place[1],
            "id": case.id,
            "question": case.question,
            "answer": case.answer,
            "judge": judge.name,
            **asdict(judgement),
            "key": key,
        }
        for key, case, judgement in rows
    )
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
