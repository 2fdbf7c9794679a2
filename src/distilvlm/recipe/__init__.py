"""What a run IS. Read `schema.py` first: a recipe file has its sections, a section its fields and defaults."""

from distilvlm.recipe.dump import differences, dump_recipe, read_dump
from distilvlm.recipe.errors import RecipeError
from distilvlm.recipe.load import load_file, load_recipe
from distilvlm.recipe.schema import (
    TERMS,
    Augmentation,
    Departure,
    LanguageSpec,
    LossSpec,
    MachineSpec,
    ModelSpec,
    OptimSpec,
    PictureSpec,
    ProjectorSpec,
    Recipe,
    SourceSpec,
    StageSpec,
    TeacherSpec,
    VisionSpec,
)
from distilvlm.recipe.section import Section
from distilvlm.recipe.transforms import TEXT, Insert, Reset, Transform, Upcycle

__all__ = [
    "TERMS",
    "TEXT",
    "Augmentation",
    "Departure",
    "Insert",
    "LanguageSpec",
    "LossSpec",
    "MachineSpec",
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
