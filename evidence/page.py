"""docs/evidence.md, out of `evidence/results/`: every figure and every verdict of it is computed here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from distilvlm.evaluate import Figure, Interval
from distilvlm.models.files import write_whole

from .results import PLACE, SeedResult, read
from .tables import ROOT, TABLES, Table
from .verdicts import NOT_DECIDED, RULE, Claim, verdict

PAGE = ROOT / "docs/evidence.md"
HEAD = Path(__file__).parent / "head.md"


def write(page: Path = PAGE, place: Path = PLACE) -> None:
    """Write the page of all tables that have a seed."""
    parts = [HEAD.read_text().rstrip(), "## How a claim is judged", RULE.rstrip()]
    for table in TABLES.values():
        seeds = read(table.name, place)
        parts += _section(table, seeds) if seeds else _missing(table)
    write_whole(page, ("\n\n".join(parts) + "\n").encode())


def claims(table: Table, seeds: Sequence[SeedResult]) -> Iterator[tuple[Claim, list[Interval | None], str, Figure]]:
    """Every claim with its differences, what the rule says of them, and the figure they are of."""
    for claim in table.claims:
        if not all(seed.has(claim.questions, claim.figure, claim.pair) for seed in seeds):
            raise ValueError(
                f"{table.name}: '{claim.says}' asks for {claim.pair} in {claim.figure} of '{claim.questions}', which "
                "not every seed has: add the pair to `differences` of the comparison, and run it again"
            )
        (figure,) = (one for one in seeds[0].figures(claim.questions) if one.name == claim.figure)
        gaps = [seed.difference(claim.questions, claim.figure, claim.pair) for seed in seeds]
        known = [one for one in gaps if one is not None]
        said = verdict(claim, known, figure.better == "lower", figure.percent)
        yield claim, gaps, said if len(known) == len(gaps) else f"{NOT_DECIDED}: undefined on some seeds", figure


def _missing(table: Table) -> list[str]:
    return [f"## {table.name}", f"Not made yet: `{table.command}`."]


def _section(table: Table, seeds: Sequence[SeedResult]) -> list[str]:
    told = seeds[-1].told
    made = (
        f"Machine: {told['machine']}; {_days(seeds)}; torch {told['versions']['torch']}, transformers "
        f"{told['versions']['transformers']}. Training took {_times(seeds)}, from start to finish of each run, with "
        "what else the machine had to do."
    )
    files = ", ".join(f"[seed {s.told['seed']}](../evidence/results/{table.name}-{s.told['seed']}.json)" for s in seeds)
    parts = [f"## {told['title']}", told["description"], f"```bash\n{table.command}\n```", made, f"Raw: {files}."]
    parts.append(_verdicts(table, seeds))
    for name in told["questions"]:
        parts += [f"### {table.name}: {told['questions'][name]['title']}", _rows(seeds, name), _gaps(seeds, name)]
    return [part for part in parts if part]


def _verdicts(table: Table, seeds: Sequence[SeedResult]) -> str:
    lines = ["| claim | whose | difference, mean over seeds [lowest, highest] | verdict |", "|---|---|---:|---|"]
    for claim, gaps, said, figure in claims(table, seeds):
        which = f"{claim.rows[0]} − {claim.rows[1]}, {claim.questions}, {figure.title}"
        lines.append(f"| {claim.says} | {claim.source} | {which}: {_spread(figure, gaps, '+')} | {said} |")
    return "\n".join(lines)


def _rows(seeds: Sequence[SeedResult], questions: str) -> str:
    """The main figure for each seed, with its interval over questions or pictures; the others as means over seeds."""
    told = seeds[0].told
    main, *others = seeds[0].figures(questions)
    about = told["questions"][questions]
    pictures = f" on {about['pictures']:,} pictures" if about["pictures"] else ""
    head = [f"{about['n']:,} questions{pictures}", *(f"seed {seed.told['seed']}" for seed in seeds)]
    head += [f"{_titled(one)}, mean over seeds [lowest, highest]" for one in (main, *others)]
    lines = [_line(head), "|---" + "|---:" * (len(head) - 1) + "|"]
    for who in told["rows"][questions]:
        values = [seed.row(questions, main.name, who) for seed in seeds]
        cells = [main.cell(value) for value in values]
        cells += [_spread(one, [seed.row(questions, one.name, who) for seed in seeds]) for one in (main, *others)]
        lines.append(_line([who, *cells]))
    return "\n".join(lines)


def _gaps(seeds: Sequence[SeedResult], questions: str) -> str:
    """Paired differences in the figures of which more, or less, is better."""
    taken = seeds[0].told["differences"][questions]
    figures = [one for one in seeds[0].figures(questions) if one.better != "neither" and taken.get(one.name)]
    blocks = []
    for figure in figures:
        head = [
            f"differences in {_titled(figure)}",
            *(f"seed {seed.told['seed']}" for seed in seeds),
            "mean [lowest, highest]",
        ]
        lines = [_line(head), "|---" + "|---:" * (len(head) - 1) + "|"]
        for pair in seeds[0].told["differences"][questions][figure.name]:
            gaps = [seed.difference(questions, figure.name, pair) for seed in seeds]
            cells = [figure.cell(gap, "+") for gap in gaps]
            lines.append(_line([pair.replace(" - ", " − "), *cells, _spread(figure, gaps, "+")]))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _spread(figure: Figure, values: Sequence[Interval | None], sign: str = "") -> str:
    """Mean, lowest and highest over seeds."""
    means = [value.mean for value in values if value is not None]
    if len(means) < len(values):
        return "undefined"
    return figure.cell(Interval(sum(means) / len(means), min(means), max(means)), sign)


def _titled(figure: Figure) -> str:
    lower = " (lower is better)" if figure.better == "lower" else ""
    return f"{figure.title}{' in %' if figure.percent else ''}{lower}"


def _days(seeds: Sequence[SeedResult]) -> str:
    return ", ".join(sorted({seed.told["date"] for seed in seeds}))


def _times(seeds: Sequence[SeedResult]) -> str:
    return ", ".join(f"{seed.told['seconds'] / 60:.0f} min for seed {seed.told['seed']}" for seed in seeds)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
