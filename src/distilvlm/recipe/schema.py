"""What a run is: a recipe is a list of stages, and a stage is
*transform the student → choose what trains → train it against targets*.

Every section of a recipe file is one class here. Unknown keys are refused. A default is a published value or says whose
it is. Nothing here imports torch, so a recipe can be read, checked and printed anywhere.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from distilvlm.recipe.agreement import check_encoders
from distilvlm.recipe.batches import check_batches
from distilvlm.recipe.encoders import ANCHOR, CacheSpec, ComparisonSpec, EncoderSpec, Mix
from distilvlm.recipe.faults import Explosion
from distilvlm.recipe.models import ModelSpec, TeacherSpec
from distilvlm.recipe.schedules import SCHEDULED, Ramp, check, filled
from distilvlm.recipe.section import Section
from distilvlm.recipe.teachers import check_kept, check_prompted, check_rows, check_sparse
from distilvlm.recipe.transforms import Insert, Reset, Transform, Upcycle
from distilvlm.recipe.tree import is_mapping


class Augmentation(Section):
    """Random changes of training pictures; a pure function of (seed, epoch, index) per sample."""

    flip: float = Field(default=0.0, ge=0, le=1, description="probability of a horizontal flip")
    crop: float = Field(
        default=1.0, gt=0, le=1, description="smallest share of the picture's area that a random crop keeps"
    )
    brightness: float = Field(default=0.0, ge=0, lt=1, description="brightness factor is drawn from 1 ± this")


class PictureSpec(Section):
    """One geometry makes one canvas per picture, which every tower sees."""

    geometry: Literal["square", "pad", "crop"] = Field(
        default="square",
        description="square: resize both sides (LLaVA-KD); pad: to a square first (LLaVA-1.5); crop: centre",
    )
    augment: Augmentation | None = None
    features: str | None = Field(
        default=None, description="directory where features of a frozen tower are kept, computed once per picture"
    )


class SourceSpec(Section):
    """One data source: LLaVA JSON/JSONL or OpenAI-style messages; also pairs of answers, or rated ones; for a stage
    that learns from pictures alone also a directory of pictures."""

    path: str = Field(
        description="a JSON or JSONL file; or shards, .tar (WebDataset) or .parquet: a file, a directory, a pattern "
        "(s3://bucket/x-*.tar) or a range (x-{000..127}.tar), here or in any store that fsspec opens"
    )
    images: str | None = Field(
        default=None, description="directory that picture paths are relative to; default: the file's"
    )
    format: Literal["auto", "llava", "messages"] = "auto"
    template: Literal["chat", "vicuna", "plain"] = Field(
        default="chat",
        description="chat: the model's own; vicuna: LLaVA-1.5's v1 conversation; plain: picture then caption",
    )
    rows: int | None = Field(
        default=None, gt=0, description="number of rows the file must have; plan uses it without the file"
    )
    take: int | None = Field(default=None, gt=0, description="use only the first so many rows")
    licence: str | None = Field(default=None, description="of the data, for the student's card")
    weight: float = Field(
        default=1.0,
        gt=0,
        description="how often an epoch shows each row: 2 twice, 0.5 half of the rows, another half each epoch",
    )


DivergenceName = Literal["forward_kl", "reverse_kl", "jensen_shannon", "skew_forward_kl", "skew_reverse_kl"]
PreferenceKind = Literal["kto", "kto_unpaired", "dpo", "ipo", "hinge"]


class LossSpec(Section):
    """Weights of a stage's loss terms; 0 leaves a term out. What shapes a term stands behind the weights."""

    text: float = Field(default=1.0, ge=0, description="cross-entropy of response tokens")
    response: float = Field(default=0.0, ge=0, description="divergence from the teacher on response rows")
    visual: float = Field(default=0.0, ge=0, description="divergence from the teacher on visual rows")
    relation: float = Field(default=0.0, ge=0, description="1 − cosine of the visual tokens' relation matrices")
    balance: float = Field(
        default=0.0, ge=0, description="load balance of experts, summed over sparse layers; LLaVA-MoD's code has 0.01"
    )
    encoder: float = Field(
        default=0.0, ge=0, description="distance to the features of the encoders (`encoders`); MoVE-KD has 0.5"
    )
    expert_balance: float = Field(
        default=0.0, ge=0, description="load balance of the vision tower's experts (`mix`); MoVE-KD's code has 0.01"
    )
    preference: float = Field(
        default=0.0, ge=0, description="preference loss of pairs or of rated answers, with the teacher as reference"
    )
    divergence: DivergenceName = Field(
        default="forward_kl",
        description="forward_kl: KL(teacher ‖ student) (LLaVA-KD); reverse_kl; jensen_shannon; skewed ones (DistiLLM)",
    )
    mix: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="λ of a divergence from a mixture of both: the student's share in jensen_shannon (default 0.9, "
        "LLaVA-KD's code), in a skewed one that of the distribution that is compared with the mixture (default 0.1)",
    )
    temperature: float = Field(default=1.0, gt=0, description="of the divergences; no τ² factor (LLaVA-KD's code)")
    schedule: dict[str, Ramp] = Field(
        default={}, description="weights of text, response, visual or relation, or the temperature, that change"
    )
    preference_kind: PreferenceKind = Field(
        default="kto", description="kto: pairs (LLaVA-MoD); kto_unpaired: single rated answers; dpo, ipo, hinge: pairs"
    )
    beta: float = Field(default=0.1, gt=0, description="of the preference loss (LLaVA-MoD's code)")
    desirable: float = Field(default=1.0, ge=0, description="weight of desirable answers (kto, kto_unpaired)")
    undesirable: float = Field(default=1.0, ge=0, description="weight of undesirable answers (kto, kto_unpaired)")
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="share of pairs that are the wrong way (dpo)")

    @model_validator(mode="before")
    @classmethod
    def _fill_schedules(cls, written: Any) -> Any:
        return filled(written) if is_mapping(written) else written

    @model_validator(mode="after")
    def _schedules_agree(self) -> LossSpec:
        check(self.schedule, {name: getattr(self, name) for name in SCHEDULED})
        if self.mix is not None and self.divergence in ("forward_kl", "reverse_kl"):
            raise ValueError(f"mix is of jensen_shannon and of the skewed divergences: {self.divergence} mixes nothing")
        return self

    @model_validator(mode="after")
    def _something_to_learn(self) -> LossSpec:
        if not (set(self.weights) - {"balance", "expert_balance"}):
            raise ValueError("every loss weight is 0: the stage would learn nothing")
        compared = [name for name in ("text", "response", "visual", "relation", "encoder") if getattr(self, name)]
        if self.preference and compared:
            zeros = ", ".join(f"{name}: 0" for name in compared)
            raise ValueError(f"a stage of preferences has no {' or '.join(compared)} loss: set {zeros}")
        return self

    def told(self, name: str) -> str:
        """A weight, or the temperature, for people: `0.5`, or `0 → 1 over the first 30%`."""
        return str(self.schedule[name]) if name in self.schedule else f"{getattr(self, name):g}"

    @property
    def compared_by(self) -> str:
        """How rows are compared with the teacher's, as far as it is not the default: `reverse_kl, temperature 2`."""
        if not (self.response or self.visual):
            return ""
        found = [] if self.divergence == "forward_kl" else [self.divergence]
        found += [] if self.mix is None else [f"λ {self.mix:g}"]
        warm = self.told("temperature")
        return ", ".join(found if warm == "1" else [*found, f"temperature {warm}"])

    @property
    def of_language(self) -> list[str]:
        """The terms that need the language model. Without any, a stage learns from pictures alone."""
        return [name for name in self.weights if name not in ("encoder", "expert_balance")]

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher gives targets, or log-probabilities that are kept before the stage begins."""
        return bool(self.response or self.visual or self.relation or self.preference)

    @property
    def compares(self) -> bool:
        """Whether rows of the teacher's are compared with the student's as the stage trains."""
        return bool(self.response or self.visual or self.relation)

    @property
    def weights(self) -> dict[str, float]:
        """Term -> weight, of the terms that are not left out."""
        return {name: weight for name in TERMS if (weight := float(getattr(self, name)))}


TERMS = ("text", "response", "visual", "relation", "balance", "encoder", "expert_balance", "preference")
"""The loss terms that a stage may weigh."""


class OptimSpec(Section):
    """AdamW and its schedule. Defaults are LLaVA-KD's (specification §3)."""

    lr: float = Field(gt=0)
    rates: dict[str, float] = Field(default={}, description="another rate for a part, e.g. {projector: 2e-5}")
    batch: int = Field(gt=0, description="samples per update, over all processes and accumulation steps")
    epochs: float | None = Field(default=None, gt=0, description="passes over the data; give this or 'updates'")
    updates: int | None = Field(default=None, gt=0, description="number of optimiser updates")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.03, ge=0, lt=1, description="share of the updates with a rising rate")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float | None = Field(default=None, gt=0, description="largest gradient norm; default: no clipping")

    @model_validator(mode="after")
    def _one_length(self) -> OptimSpec:
        if (self.epochs is None) == (self.updates is None):
            raise ValueError("give exactly one of 'epochs' and 'updates'")
        return self


Departure = Literal["unshifted_mask", "token_mean", "doubled_balance", "padding", "undetached_z0", "gumbel", "capacity"]
"""Where LLaVA-MoD's code differs from what this package does by default (specification §2.3, §1.3, §1.4, §2.4):

unshifted_mask   the response divergence stands one position late: on the answers' tokens, not on their predictions
token_mean       text and response are means over the micro-batch's tokens, not over samples
doubled_balance  the balance loss counts twice beside the text loss
padding          padding counts in the balance loss, which is formed over the whole micro-batch
undetached_z0    KTO's z0 is each micro-batch's own, and carries a gradient
gumbel           the second expert is drawn, in training
capacity         experts take 1.5 times an even share of a training batch's tokens
"""


class StageSpec(Section):
    """One stage: transform the student → choose what trains → train it against targets."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    transform: list[Transform] = Field(default=[], description="what is done to the student before it trains")
    train: list[str] = Field(min_length=1, description="parts that train: projector, language, vision, adaptor, ...")
    data: list[str] = Field(min_length=1, description="names of data sources")
    loss: LossSpec = LossSpec()
    encoder: ComparisonSpec = Field(default=ComparisonSpec(), description="what stands behind loss.encoder")
    optim: OptimSpec
    order: Literal["random", "grouped", "shards"] = Field(
        default="random",
        description="grouped: batches of one modality and similar length (LLaVA-1.5's sampler); shards: shards in "
        "random order, each read from front to back and shuffled nearby, for storage that is slow at random",
    )
    max_length: int = Field(default=2048, gt=0, description="positions, visual tokens included; longer rows are cut")
    reference: list[Departure] = Field(
        default=[], description="parity with LLaVA-MoD's code where this package departs from it on purpose"
    )

    @property
    def resets(self) -> list[str]:
        """Parts that go back to their starting weights."""
        return [part for transform in self.transform if isinstance(transform, Reset) for part in transform.parts]

    @property
    def upcycles(self) -> Upcycle | None:
        """How the stage makes the student sparse, if it does."""
        return next((transform for transform in self.transform if isinstance(transform, Upcycle)), None)

    @property
    def inserts(self) -> Insert | None:
        """The adaptor that the stage inserts, if it does."""
        return next((transform for transform in self.transform if isinstance(transform, Insert)), None)

    @property
    def mixes(self) -> Mix | None:
        """How the stage gives the vision tower experts, if it does."""
        return next((transform for transform in self.transform if isinstance(transform, Mix)), None)

    @property
    def pictures_alone(self) -> bool:
        """Whether the stage learns from pictures alone: its language model does not run, and texts are not read."""
        return not self.loss.of_language

    @model_validator(mode="after")
    def _transforms_once(self) -> StageSpec:
        if sum(isinstance(transform, Upcycle) for transform in self.transform) > 1:
            raise ValueError("upcycles twice: a sparse student cannot become sparse again")
        if sum(isinstance(transform, Insert) for transform in self.transform) > 1:
            raise ValueError(
                "inserts twice: only the later adaptor would train. Insert the other in a stage of its own"
            )
        if sum(isinstance(transform, Mix) for transform in self.transform) > 1:
            raise ValueError("mixes twice: a vision tower has one mixture of experts")
        return self


class MachineSpec(Section):
    """How the machine works; nothing here changes the objective, so it may differ between continuations."""

    micro_batch: int = Field(default=1, gt=0, description="samples per forward and process")
    tokens: int | None = Field(
        default=None, gt=0, description="positions per forward and process, at most, instead of micro_batch samples"
    )
    packing: bool = Field(default=False, description="several samples in one row, where none sees the others")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="autocast; what trains is held in fp32 in any case"
    )
    gradient_checkpointing: bool = False
    parallel: Literal["ddp", "fsdp", "deepspeed"] = Field(
        default="ddp",
        description="of several processes, each holds the whole student (ddp), or its rows of all weights, gradients "
        "and moments (fsdp: FSDP2), or its part of the moments (deepspeed: ZeRO stage 1)",
    )
    deepspeed: str | None = Field(
        default=None, description="with parallel: deepspeed, the JSON file of its own settings: zero_optimization"
    )
    offload: bool = Field(
        default=False, description="with parallel: fsdp, these rows wait in the CPU's memory, where AdamW runs, too"
    )
    shard_teacher: bool = Field(
        default=False, description="with parallel: fsdp, a local teacher's layers are split over the processes, too"
    )
    workers: int = Field(default=0, ge=0, description="loader processes")
    checkpoint_every: int = Field(default=500, gt=0, description="updates between checkpoints")
    keep: int = Field(default=2, gt=0, description="checkpoints kept while a stage runs")
    on_bad_row: Literal["fatal", "quarantine"] = Field(
        default="fatal",
        description="a row that can't be used stops the run, or goes to quarantine.jsonl and is counted",
    )
    trackers: list[str] = Field(default=[], description="accelerate's trackers: tensorboard, wandb, trackio, ...")
    explosion: Explosion = Explosion()
    timeout: float = Field(
        default=1800.0,
        gt=0,
        description="seconds that a process may stand still before the others give it up (torch's own for gloo)",
    )

    @model_validator(mode="after")
    def _sharded_only(self) -> MachineSpec:
        if self.parallel != "fsdp":
            for name in ("offload", "shard_teacher"):
                if getattr(self, name):
                    raise ValueError(f"'{name}' needs 'parallel: fsdp'")
        if (self.parallel == "deepspeed") != (self.deepspeed is not None):
            raise ValueError(
                "'parallel: deepspeed' and 'deepspeed: FILE.json' need each other: what the file says of ZeRO, "
                'e.g. {"zero_optimization": {"stage": 1}}'
            )
        return self


class Recipe(Section):
    """A recipe file after `extends`, overrides and its preset were applied."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    description: str = ""
    licence: str | None = Field(default=None, description="of the student, as its card says it, e.g. apache-2.0")
    intended_use: str | None = Field(default=None, description="what the student is for and what not: for its card")
    seed: int = Field(default=1234, ge=0, description="LLaVA-KD's scripts use 1234")
    student: ModelSpec
    teacher: TeacherSpec | None = None
    encoders: dict[str, EncoderSpec] = Field(default={}, description="vision encoders that teach; 'anchor' is special")
    cache: CacheSpec | None = Field(default=None, description="default: encoders see every picture each time")
    pictures: PictureSpec = PictureSpec()
    data: dict[str, SourceSpec] = Field(min_length=1)
    stages: list[StageSpec] = Field(min_length=1)
    machine: MachineSpec = MachineSpec()

    @model_validator(mode="after")
    def _names_agree(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ: {names}")
        for stage in self.stages:
            for source in stage.data:
                if source not in self.data:
                    raise ValueError(
                        f"stage '{stage.name}' uses data '{source}', but 'data' has only {sorted(self.data)}"
                    )
            if self.pictures.features is not None and any(part.partition(".")[0] == "vision" for part in stage.train):
                raise ValueError(f"stage '{stage.name}' trains the vision tower: remove 'pictures.features'")
            if stage.loss.preference and self.pictures.augment is not None:
                raise ValueError(
                    f"stage '{stage.name}' learns from preferences, whose reference sees each picture once: remove "
                    "'pictures.augment'"
                )
            if stage.loss.needs_teacher and self.teacher is None:
                raise ValueError(f"stage '{stage.name}' has a teacher's loss term, but the recipe has no 'teacher'")
        if self.machine.shard_teacher and self.teacher is not None and self.teacher.bits is not None:
            raise ValueError(
                "machine.shard_teacher: a teacher in 8 or 4 bits can't be split over processes; set it to false, or "
                "teacher.precision to bf16"
            )
        self._check_transforms()
        self._check_adaptors()
        check_encoders(self)
        check_rows(self)
        check_kept(self)
        check_prompted(self)
        check_sparse(self)
        check_batches(self)
        return self

    def teachers_of(self, stage: StageSpec) -> dict[str, EncoderSpec]:
        """The encoders that `stage` compares the student with, the anchor first (the method's order)."""
        names = list(self.encoders) if stage.encoder.teachers is None else stage.encoder.teachers
        names = sorted(names, key=lambda name: name != ANCHOR) if stage.loss.encoder else []
        return {name: self.encoders[name] for name in names}

    def _check_transforms(self) -> None:
        sparse: str | None = None
        mixed: str | None = None
        for stage in self.stages:
            if sparse is not None and stage.upcycles is not None:
                raise ValueError(f"stage '{stage.name}' upcycles a student that '{sparse}' has made sparse already")
            if stage.upcycles is not None:
                sparse = stage.name
            if sparse is not None and any(part.partition(".")[0] == "language" for part in stage.resets):
                raise ValueError(
                    f"stage '{stage.name}' resets the language model, which is sparse since '{sparse}': its starting "
                    "weights are a dense model's. Reset it in an earlier stage"
                )
            if stage.mixes is not None and mixed is not None:
                raise ValueError(
                    f"stage '{stage.name}' mixes experts into a tower that '{mixed}' has given some already"
                )
            mixed = stage.name if stage.mixes is not None else mixed
            if mixed is not None and any(part.partition(".")[0] == "vision" for part in stage.resets):
                raise ValueError(
                    f"stage '{stage.name}' resets the vision tower, which has experts since '{mixed}': its starting "
                    "weights have none. Reset it in an earlier stage"
                )

    def _check_adaptors(self) -> None:
        """From an insert on nothing but adaptors trains, and before it nothing but what they copy."""
        inserting = [stage.name for stage in self.stages if stage.inserts is not None]
        held = self.student.source is not None  # by the directory that the student comes from, perhaps
        if inserting and (sparse := next((stage.name for stage in self.stages if stage.upcycles is not None), None)):
            raise ValueError(
                f"stage '{inserting[0]}' inserts an adaptor, which freezes the language model, and '{sparse}' upcycles "
                "it: make these two recipes"
            )
        known: list[str] = []
        for stage in self.stages:
            insert = stage.inserts
            if insert is not None:
                if insert.adaptor in known:
                    raise ValueError(f"stage '{stage.name}' inserts '{insert.adaptor}' again: give it another name")
                if insert.start not in ("base", *known) and not held:
                    there = ", ".join(["base", *known])
                    raise ValueError(
                        f"stage '{stage.name}' starts its adaptor from '{insert.start}': there is only {there}"
                    )
                known.append(insert.adaptor)
            for part in stage.train:
                kind = part.partition(".")[0]
                if kind == "adaptor" and not known and not held:
                    raise ValueError(
                        f"stage '{stage.name}' trains '{part}', but neither it nor an earlier stage inserts an adaptor "
                        "(transform: [{do: insert, ...}])"
                    )
                allowed = "adaptor" if known else "projector"
                if inserting and kind not in ("adaptor", allowed):
                    raise ValueError(
                        f"stage '{stage.name}' trains '{part}', but the recipe inserts an adaptor ('{inserting[0]}'), "
                        f"whose base stays as it is: {'behind an insert' if known else 'before it'} only '{allowed}' "
                        "may train"
                    )
            if known and stage.resets:
                raise ValueError(
                    f"stage '{stage.name}' resets {', '.join(stage.resets)} behind an insert: nothing but adaptors has "
                    "trained since, and a fresh one is inserted under another name"
                )
