"""What a language model still knows, alone or in a VLM: multiple choice, perplexity, replies.

Read `choices.py` first; `likelihood.py` is what it stands on. Every function asks a model in its active workflow, as
`models.text_only.load` gives it.
"""

from distilvlm.evaluate.text.choices import CHOICES, Choice, choose
from distilvlm.evaluate.text.dialogues import PROMPTS, read_prompts, reply, side_by_side, write_side_by_side
from distilvlm.evaluate.text.exams import read_ceval, read_mmlu
from distilvlm.evaluate.text.likelihood import Likelihood, Passage, likelihoods
from distilvlm.evaluate.text.perplexity import PERPLEXITY, perplexity, read_texts
from distilvlm.evaluate.text.sets import SETS, read_saved_mmlu, read_set, sets_directory
from distilvlm.evaluate.text.tasks import TASKS, read_task

__all__ = [
    "CHOICES",
    "PERPLEXITY",
    "PROMPTS",
    "SETS",
    "TASKS",
    "Choice",
    "Likelihood",
    "Passage",
    "choose",
    "likelihoods",
    "perplexity",
    "read_ceval",
    "read_mmlu",
    "read_prompts",
    "read_saved_mmlu",
    "read_set",
    "read_task",
    "read_texts",
    "reply",
    "sets_directory",
    "side_by_side",
    "write_side_by_side",
]
