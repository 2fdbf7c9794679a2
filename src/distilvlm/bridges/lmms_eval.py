"""lmms-eval's `--model distilvlm`: a student in lmms-eval's own process, without a server and without a hub.

lmms-eval finds it by an entry point of this package, wherever both are installed:

    python -m lmms_eval eval --model distilvlm --model_args path=runs/mine/model --tasks rows \\
        --include_path bridges/lmms_eval
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

from distilvlm.data.batch import SampleKey
from distilvlm.data.geometry import Geometry
from distilvlm.data.markers import place
from distilvlm.data.records import IMAGE_TOKEN, Record, Turn
from distilvlm.evaluate import answer
from distilvlm.models.save import geometry_of, load

MANIFEST = ModelManifest(model_id="distilvlm", simple_class_path="distilvlm.bridges.lmms_eval.Student")

DEFAULT_TOKENS = 128
"""Of an answer, where a task does not say."""


class Student(lmms):
    """A model that answers greedily, in batches.

    Args:
        path: RUN/model, a directory of adaptors, or any Llava of transformers.
        template: as in its training.
        workflow: of adaptors, the one that answers; default: the last inserted.
        precision: fp32 or bf16.
    """

    is_simple = True

    def __init__(
        self,
        path: str,
        template: Any = "chat",
        workflow: str | None = None,
        precision: str = "fp32",
        batch_size: int | str = 16,
        device: str | None = None,
    ) -> None:
        super().__init__()
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._vlm = load(path, dtype).use(workflow).to(torch.device(where))
        self._geometry: Geometry = geometry_of(path)
        self._template = template
        self._batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers, in order.

        Raises:
            ValueError: a task that wants draws: answers here are the likeliest.
        """
        found: dict[int, str] = {}
        limits: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            settings = request.args[1]
            if settings.get("do_sample") or (settings.get("temperature") or 0) > 0:
                raise ValueError(
                    f"the task {request.args[4]} wants sampled answers; here they are greedy: set temperature 0, or "
                    "ask `distilvlm serve` by lmms-eval's `--model openai`"
                )
            limits.setdefault(int(settings.get("max_new_tokens", DEFAULT_TOKENS)), []).append(number)
        with tempfile.TemporaryDirectory(prefix="pictures-") as directory:
            for limit, numbers in limits.items():
                records = [self._record(requests[number], number, Path(directory)) for number in numbers]
                texts = answer(
                    self._vlm,
                    records,
                    self._template,
                    self._geometry,
                    batch_size=self._batch_size,
                    max_new_tokens=limit,
                )
                found |= zip(numbers, texts, strict=True)
        answers = [_cut(found[number], request.args[1]) for number, request in enumerate(requests)]
        for request, text in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", (request.args[0], request.args[1]), text)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "options are not weighed here: take a task that generates, or `distilvlm evaluate --suite`, or lm-eval "
            "against `distilvlm serve` for text (docs/bridges.md)"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("several rounds are not asked here: take a task of one (docs/bridges.md)")

    def _record(self, request: Any, number: int, directory: Path) -> Record:
        """A request whose pictures lie in files."""
        text, _, pictures_of, doc, task, split = request.args
        paths: list[str] = []
        for place_, picture in enumerate(pictures_of(self.task_dict[task][split][doc]) or ()):
            path = directory / f"{number}-{place_}.png"
            picture.convert("RGB").save(path)
            paths.append(str(path))
        if paths and IMAGE_TOKEN not in text:
            text = f"{IMAGE_TOKEN}\n" * len(paths) + text
        turns = place([Turn("user", text)], len(paths), "context", ["context"])[0]
        return Record(SampleKey(task, task, number), str(doc), tuple(paths), tuple(turns))


def _cut(text: str, settings: Mapping[str, Any]) -> str:
    """An answer up to the first of the texts that end it."""
    until = settings.get("until") or []
    for end in [until] if isinstance(until, str) else until:
        text = text.split(end)[0] if end else text
    return text.strip()
