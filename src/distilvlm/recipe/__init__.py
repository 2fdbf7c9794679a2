"""What a run IS. Read `schema.py` and `models.py` first: a file has sections, a section its fields and defaults."""

from distilvlm.recipe.dump import differences, dump_recipe, read_dump
from distilvlm.recipe.encoders import ANCHOR, CacheSpec, ComparisonSpec, EncoderSpec, Mix
from distilvlm.recipe.errors import RecipeError
from distilvlm.recipe.load import load_file, load_recipe
from distilvlm.recipe.models import LanguageSpec, ModelSpec, ProjectorSpec, TeacherSpec, VisionSpec
from distilvlm.recipe.schema import (
    TERMS,
    Augmentation,
    Departure,
    LossSpec,
    MachineSpec,
    OptimSpec,
    PictureSpec,
    Recipe,
    SourceSpec,
    StageSpec,
)
from distilvlm.recipe.section import Section
from distilvlm.recipe.transforms import TEXT, Insert, Reset, Transform, Upcycle

__all__ = [
    "ANCHOR",
    "TERMS",
    "TEXT",
    "Augmentation",
    "CacheSpec",
    "ComparisonSpec",
    "Departure",
    "EncoderSpec",
    "Insert",
    "LanguageSpec",
    "LossSpec",
    "MachineSpec",
    "Mix",
    "ModelSpec",
    "OptimSpec",
    "PictureSpec",
    "ProjectorSpec",
    "Recipe",
    "RecipeError",
    "Reset",
    "Section",
    "SourceSpec",
    "StageSpec",
    "TeacherSpec",
    "Transform",
    "Upcycle",
    "VisionSpec",
    "differences",
    "dump_recipe",
    "load_file",
    "load_recipe",
    "read_dump",
]
