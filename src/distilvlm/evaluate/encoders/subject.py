"""What can be measured: an encoder's directory or hub id as it is, or the student of a run with its teachers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from distilvlm.data import DataError
from distilvlm.data.geometry import Geometry
from distilvlm.data.stage import background
from distilvlm.evaluate.encoders.error import Pairs, feature_errors, feature_questions
from distilvlm.evaluate.encoders.features import Pooling, Vectors, canvases_of
from distilvlm.evaluate.encoders.labelled import pictures
from distilvlm.evaluate.encoders.measured import Labels, measured
from distilvlm.evaluate.encoders.measures import FEATURE_READOUT, OF_FEATURES
from distilvlm.evaluate.encoders.nearest import NEIGHBOURS
from distilvlm.evaluate.encoders.readout import Readout
from distilvlm.evaluate.questions import Question
from distilvlm.evaluate.report import Evaluation
from distilvlm.models.adapters import Adapters, regridded
from distilvlm.models.compose import build_student
from distilvlm.models.encoder_directory import load_encoder
from distilvlm.models.encoders import EncoderTeacher, Seen, build_encoder, frozen_copy
from distilvlm.models.files import verify
from distilvlm.models.save import geometry_of, layout_in, load
from distilvlm.models.sources import is_local
from distilvlm.recipe import ANCHOR, EncoderSpec, StageSpec, read_dump
from distilvlm.runs.directory import RunDirectory
from distilvlm.teachers.encoder_cache import EncoderCache
from distilvlm.teachers.encoders import EncoderTeachers, moved, restored, shapes
from distilvlm.train.encoders import Comparison, adapt, adapters_of

BATCH = 16
"""Pictures that are compared with all teachers at a time."""


class Subject:
    """An encoder as it is.

    Args:
        source: directory or hub id.
        layer, size, geometry: default: as its directory says, if this package wrote it; else hidden state -2, its own
            size, squares.
    """

    def __init__(
        self, source: str, layer: int | None = None, size: int | None = None, geometry: Geometry | None = None
    ) -> None:
        layout = layout_in(source) if is_local(source) else None
        self.geometry: Geometry = geometry or ("square" if layout is None else geometry_of(source))
        if layout is not None:
            layer, size = layer if layer is not None else layout.layer, size or layout.size
        spec = EncoderSpec.model_validate({"from": source, "layer": layer, "size": size})
        self.encoder: EncoderTeacher = _on_device(build_encoder(spec, Path(source).name))

    def measured(
        self, labels: Labels, pooling: Pooling = "mean", neighbours: int = NEIGHBOURS, batch: int = 32
    ) -> dict[str, Evaluation]:
        """Measure → evaluation: what `measured` gives."""
        return measured(Vectors(self.encoder, self.geometry, pooling, batch), labels, neighbours=neighbours)


class SubjectOfRun(Subject):
    """The finished student of a run, with what it was compared with; of a vision-language model, its tower.

    Raises:
        DataError: the run is not finished.
    """

    def __init__(self, directory: str | Path) -> None:
        self._place = place = RunDirectory(Path(directory))
        self.recipe = recipe = read_dump(place.recipe.read_text(encoding="utf-8"))
        if problems := verify(place.model, contents=False):
            raise DataError(f"{directory} has no finished student: {'; '.join(problems)}; run its recipe to the end")
        self.geometry = recipe.pictures.geometry
        student = load_encoder(place.model) if recipe.student.encoder_alone else load(place.model)
        self.layer = student.layout.layer
        self.encoder = _on_device(frozen_copy(student.model.model.vision_tower, student.layout, recipe.name))
        self._tokens: dict[str, Tensor] = {}  # decoding pictures takes longer than all that is done with their tokens

    @property
    def _stages(self) -> list[StageSpec]:
        return [stage for stage in self.recipe.stages if stage.loss.encoder]

    @property
    def teachers(self) -> list[str]:
        """The encoders that its last stage with any was compared with, without the anchor."""
        return [name for name in self.recipe.teachers_of(self._stages[-1]) if name != ANCHOR] if self._stages else []

    def measured(
        self, labels: Labels, pooling: Pooling = "mean", neighbours: int = NEIGHBOURS, batch: int = 32
    ) -> dict[str, Evaluation]:
        """The same, and of a run with teachers those `OF_FEATURES` on the test pictures."""
        found = super().measured(labels, pooling, neighbours, batch)
        if self.teachers:
            questions = feature_questions(labels.test, self.teachers)
            found |= {name: self.of_features(name, pictures(labels.training), questions) for name in OF_FEATURES}
        return found

    def of_features(self, measure: str, training: Sequence[str], questions: Sequence[Question]) -> Evaluation:
        """How far it is from its teachers' features, by one of `OF_FEATURES`.

        Raises:
            ValueError: as `feature_errors`, and as `Readout`.
        """
        compared = Readout(self.tokens, training) if measure == FEATURE_READOUT.name else self.compared
        return feature_errors(compared, training, questions, OF_FEATURES[measure])

    def compared(self, paths: Sequence[str]) -> Iterator[Pairs]:
        """The student's features and its teachers' where the loss compares them, through the run's adapters.

        Raises:
            PictureError, FeatureError: a picture can't be read.
        """
        adapters = self._teachers[1]
        for tokens, seen in self._seen(paths):
            targets = {name: seen[name].tokens for name in adapters.teachers}
            with torch.no_grad():
                pairs = adapters(tokens, targets)
            yield {pair.teacher: (pair.student, pair.target) for pair in pairs}

    def tokens(self, paths: Sequence[str]) -> Iterator[Pairs]:
        """The student's tokens on each teacher's grid, [pictures, N, d], and the teacher's own."""
        for tokens, seen in self._seen(paths):
            own = {name: regridded(tokens, self.encoder.grid, seen[name].grid) for name in self.teachers}
            yield {name: (own[name], seen[name].tokens) for name in self.teachers}

    def _seen(self, paths: Sequence[str]) -> Iterator[tuple[Tensor, Mapping[str, Seen]]]:
        """The student's tokens, [pictures, n, d], and what its teachers saw, in batches."""
        see, _, fill = self._teachers
        fill(paths)
        new = [path for path in dict.fromkeys(paths) if path not in self._tokens]
        canvases = canvases_of(new, self.geometry, self.encoder.size, BATCH, background(self.encoder.view))
        for number, batch in enumerate(canvases):
            tokens = self.encoder.see(self.encoder.pixels(batch)).tokens.cpu()
            self._tokens.update(zip(new[number * BATCH :], tokens, strict=False))
        for start in range(0, len(paths), BATCH):
            batch = paths[start : start + BATCH]
            yield torch.stack([self._tokens[path] for path in batch]).to(self.encoder.device), see(batch)

    @cached_property
    def _teachers(
        self,
    ) -> tuple[Callable[[Sequence[str]], Mapping[str, Seen]], Adapters, Callable[[Sequence[str]], object]]:
        """What gives the teachers' features of pictures, the adapters, and what fills the run's cache, where it has one
        to take these features from."""
        recipe, device = self.recipe, self.encoder.device
        stage = self._stages[-1]
        initial = build_student(recipe.student, recipe.seed)  # as the anchor keeps it
        forms = shapes(recipe, initial)
        teachers = EncoderTeachers(recipe, initial, device)
        adapt(recipe, initial, forms)
        Comparison(recipe, stage, forms).install(initial.model)
        adapters = adapters_of(initial.model)
        assert adapters is not None  # a stage compares with teachers
        adapters.load_state_dict(load_file(self._place.adapters / "adapters.safetensors"))
        # How much a token or teacher counts is the loss's: what is measured is the distance.
        adapters.rules = replace(adapters.rules, token_weights="none", teacher_weights="none")
        if recipe.cache is None:
            return lambda paths: teachers.of_paths(paths, stage), adapters.to(device).eval(), lambda paths: None
        cache = EncoderCache(recipe, teachers, initial)
        read = cache.reader()

        def fill(paths: Sequence[str]) -> None:
            nonlocal read
            cache.fill(paths)
            read = cache.reader()  # one that has read the index before does not know what was added

        def kept(paths: Sequence[str]) -> dict[str, Seen]:
            found = [read(path) for path in paths]
            together = {field: torch.stack([one[field] for one in found]) for field in found[0]}
            return {name: moved(one, device) for name, one in restored(together, teachers.grids).items()}

        return kept, adapters.to(device).eval(), fill


def subjects(
    sources: Sequence[str], layer: int | None = None, size: int | None = None, geometry: Geometry | None = None
) -> dict[str, Subject]:
    """Of a run's directory its student, as it was trained; of any other the encoder.

    Args:
        layer, size, geometry: of those that are no runs; default: as the first run among the sources has them, so that
            like is compared with like; without one, as `Subject` says.
    """
    runs = {source: SubjectOfRun(source) for source in sources if (Path(source) / "recipe.yaml").exists()}
    for run in list(runs.values())[:1]:
        layer, size = run.layer if layer is None else layer, size or run.encoder.size
        geometry = geometry or run.geometry
    return {
        source: runs[source] if source in runs else Subject(source, layer, size, geometry)
        for source in dict.fromkeys(sources)
    }


def _on_device(encoder: EncoderTeacher) -> EncoderTeacher:
    return encoder.to("cuda") if torch.cuda.is_available() else encoder
