"""A comparison small enough to read: made-up answers and scores, and one real run of a second."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from distilvlm.data import Record, SampleKey, Turn
from distilvlm.evaluate import difference, gap_closed, score
from distilvlm.evaluate.questions import Question

MODELS = ("teacher", "control", "distilled")
BASELINES = ("majority",)
PAIRS = (("teacher", "control"), ("distilled", "control"))
SCRIPT = "<script>alert('x')</script><img src=x onerror=alert(1)>"

# question -> the right answer, then majority's, teacher's, control's, distilled's
ANSWERS = {
    "q-all-right": ("red", "red", "red", "red", "red"),
    "q-teacher-only": ("blue", "red", "blue", "red", "red"),
    "q-control-only": ("green", "red", "red", "green", SCRIPT),
    "q-same-wrong": ("white", "red", "red", "red", "red"),
    "q-distilled-1": ("black", "red", "black", "red", "black"),
    "q-other-wrong": ("white", "red", "blue", "green", "red"),
    "q-distilled-2": ("black", "red", "black", "red", "black"),
}


def facts(place: int) -> dict[str, Any]:
    """The teacher is larger; nobody measured how fast the control is."""
    size = 7007000 if place == 0 else 1234
    answering = {"tokens_per_second": 12.5, "together_per_second": 98.7, "together": 16, "tokens": 32}
    answering |= {"peak_memory_bytes": 3.3e8, "precision": "fp32", "machine": "a small machine", "date": "2026-11-21"}
    known = {"parameters": size, "language_model_parameters": 567, "active_parameters": size - 34, "disk_bytes": 4_936}
    return known | {"training_seconds": 10.0 * (place + 1), "answering": None if place == 1 else answering}


def write_answers(directory: Path, pictures: Path) -> dict[str, Any]:
    """Answers files of seed 0; returns the rows and differences of `comparison.json`."""
    asked = []
    for row, (text, given) in enumerate(ANSWERS.items()):
        # One text-only question, one about two pictures, one whose picture is gone.
        names = {0: (), 1: ("0.png", "1.png"), 2: ("gone.png",)}.get(row, (f"{row // 2}.png",))
        turns = (Turn("user", text), Turn("assistant", given[0]))
        record = Record(SampleKey("test", "test.json", row), str(row), tuple(str(pictures / n) for n in names), turns)
        asked.append(Question(record, 0))
    rows: dict[str, Any] = {}
    for column, name in enumerate((*BASELINES, *MODELS), start=1):
        rows[name] = score(asked, [given[column] for given in ANSWERS.values()], by_picture=True)
        rows[name].write(directory / "seed-0" / "answers" / "colours" / f"{name}.jsonl")
    gaps = {f"{a} - {b}": vars(difference(rows[a], rows[b])) for a, b in PAIRS}
    closed = gap_closed(rows["distilled"], rows["control"], rows["teacher"])
    shares = {"distilled": closed and vars(closed)}
    return {"rows": {name: row.summary() for name, row in rows.items()}, "differences": gaps, "closed": shares}


def write_comparison(directory: Path, run: Path, pictures: Path) -> Path:
    """A comparison whose distilled run is `run`, its control the same without what newer versions record and without a
    model, and whose teacher's directory is gone. The second seed has scores alone."""
    seed = write_answers(directory, pictures)
    for name in ("distilled", "control"):
        shutil.copytree(run, directory / "seed-0" / name)
    control = directory / "seed-0" / "control"
    shutil.rmtree(control / "model")
    for name in ("about.json", "doctor.json", "cost.json"):
        (control / name).unlink(missing_ok=True)
    second = json.loads(json.dumps(seed))
    second["differences"]["distilled - control"] = {"mean": -0.25, "low": -0.5, "high": -0.125}
    second["closed"] = {"distilled": {"mean": 0.625, "low": 0.25, "high": 1.125}}
    seeds = [
        {
            "seed": number,
            "rows": {"colours": one["rows"]},
            "differences": {"colours": one["differences"]},
            "closed": {"colours": one["closed"]},
        }
        for number, one in enumerate((seed, second))
    ]
    seeds[0]["runs"] = {name: f"seed-0/{name}" for name in MODELS}
    content = {
        "name": "colours",
        "title": "Colours & <shapes>",
        "description": "",
        "command": "distilvlm colours --seeds 2",
        "date": "2026-11-21",
        "machine": "a small machine",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "seconds": {"seed 0: teacher": 110.0, "answers": 2.5},
        "roles": {"teacher": "teacher", "control": "control"},
        "models": {name: facts(place) for place, name in enumerate(MODELS)},
        "baselines": list(BASELINES),
        "questions": {"colours": {"title": "Seven colours", "n": len(ANSWERS), "pictures": 5}},
        "differences": [list(pair) for pair in PAIRS],
        "seeds": seeds,
    }
    (directory / "comparison.json").write_text(json.dumps(content))
    return directory


def write_new_files(run: Path) -> None:
    """What a run records today, with figures that can be looked for."""
    (run / "about.json").write_text(
        json.dumps(
            {
                "command": ["/somewhere/bin/distilvlm", "run", "my recipe.yaml"],
                "started": "2026-11-21T21:16:04+00:00",
                "finished": "2026-11-21T21:17:31+00:00",
                "machine": {"processor": "Xeon", "cores": 2, "memory_bytes": 2**34, "device": "cpu"},
                "versions": {"python": "3.11.7", "torch": "2.13.0"},
                "processes": 1,
            }
        )
    )
    findings = [
        {"check": "disk.space", "level": "ok", "stage": None, "text": "112 GB free", "fix": ""},
        {"check": "parts.random", "level": "warning", "stage": "dpt", "text": "frozen and random", "fix": "train it"},
    ]
    (run / "doctor.json").write_text(json.dumps({"findings": findings}))
    estimate = {"peak_memory_bytes": 1.1e9, "seconds_per_update": 0.09, "disk_bytes": 2_000}
    measured = {"peak_memory_bytes": 1.0e9, "seconds_per_update": 0.1, "disk_bytes": 2_000}
    stages = [{"stage": name, "estimate": estimate, "measured": measured} for name in ("dpt", "sft")]
    stages.append({"stage": "dft", "estimate": estimate, "measured": None})
    (run / "cost.json").write_text(json.dumps({"stages": stages}))
    about = {
        "stage": "dpt",
        "transform": [],
        "trains": {"projector": {"parameters": 4321, "dtype": "float32"}},
        "data": {"captions": {"samples": 10, "cut": 3, "neutralised": 2}},
        "updates": 6,
        "terms": {"text": 1.0, "relation": 0.5},
        "seconds": 3.5,
    }
    (run / "stages" / "00-dpt" / "about.json").write_text(json.dumps(about))
    row = {"stage": "sft", "source": "questions", "file": "questions.json", "row": 7, "field": "image"}
    (run / "quarantine.jsonl").write_text(json.dumps({**row, "reason": "no file 7.png"}) + "\n")
