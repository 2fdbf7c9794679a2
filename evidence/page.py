"""docs/evidence.md, out of `evidence/results/`: every figure and every verdict of it is computed here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from distilvlm.evaluate import Figure, Interval
from distilvlm.models.files import write_whole

from .picture import COLOURS, Judged, draw
from .results import PLACE, SeedResult, read
from .tables import ROOT, TABLES, Table
from .verdicts import DOES_NOT_HOLD, HOLDS, NOT_DECIDED, RULE, Claim, favour, verdict

PAGE = ROOT / "docs/evidence.md"
PICTURE = "evidence.svg"
HEAD, NOTES = (Path(__file__).with_name(name) for name in ("head.md", "notes.md"))


def write(page: Path = PAGE, place: Path = PLACE) -> None:
    """Write the page of all tables that have a seed, and its picture beside it."""
    seeds = {table: read(table.name, place) for table in TABLES.values()}
    made = {table: found for table, found in seeds.items() if found}
    parts = [HEAD.read_text().rstrip(), *_glance(made), NOTES.read_text().rstrip()]
    parts += ["## How a claim is judged", RULE.rstrip()]
    for table, found in seeds.items():
        parts += _section(table, found) if found else _missing(table)
    write_whole(page, ("\n\n".join(parts) + "\n").encode())
    shares = {found[0].told["title"]: _shares(table, found) for table, found in made.items()}
    write_whole(page.with_name(PICTURE), draw(shares).encode())


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


def _glance(made: Mapping[Table, Sequence[SeedResult]]) -> list[str]:
    """How many claims of each table have which verdict, and the picture."""
    lines = [_line(["table", "seeds", *COLOURS]), "|---" + "|---:" * (1 + len(COLOURS)) + "|"]
    for table, seeds in made.items():
        said = [_short(said) for _, _, said, _ in claims(table, seeds)]
        counts = (str(said.count(known)) for known in COLOURS)
        title = seeds[0].told["title"]
        lines.append(_line([f"[{title}](#{_anchor(title)})", str(len(seeds)), *counts]))
    left_out = "Claims about perplexity, and that two rows are the same, are in the tables only."
    return [
        "## At a glance",
        "\n".join(lines),
        f"![Every claim, by how much each seed speaks for it]({PICTURE})",
        left_out,
    ]


def _shares(table: Table, seeds: Sequence[SeedResult]) -> list[Judged]:
    """What the picture shows of a table."""
    return [
        Judged(claim.says, [favour(gap, figure.better == "lower") for gap in gaps if gap is not None], _short(said))
        for claim, gaps, said, figure in claims(table, seeds)
        if figure.percent and claim.kind == "better"
    ]


def _short(said: str) -> str:
    """A verdict without its reason."""
    return next(known for known in (HOLDS, DOES_NOT_HOLD, NOT_DECIDED) if said.startswith(known))


def _anchor(title: str) -> str:
    """Of a heading, as GitHub and the documentation's pages make it."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


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
