"""Counts of data sources as tables for a terminal: a column per source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table

from distilvlm.data.convert.mixing import Part
from distilvlm.data.report import DataReport
from distilvlm.data.statistics import PictureStatistics, Shared, Spread, Statistics, TokenStatistics


def report_table(stages: Sequence[str], report: DataReport) -> Table:
    """What stages train on, in positions (tokens of text and of pictures)."""
    table = _table("stage " + ", ".join(stages), report.sources)
    sources = report.sources.values()
    lines = {
        "samples": [f"{source.samples:,}" for source in sources],
        **_preferences([(source.pairs, source.rated, source.desirable) for source in sources]),
        "weight": [f"{source.weight:g}" for source in sources],
        "share of an epoch": [f"{report.share(name):.1%}" for name in report.sources],
        "with pictures": [f"{source.with_pictures:,}" for source in sources],
        "positions: mean": [f"{source.mean:.1f}" for source in sources],
        "  half at most": [f"{source.median:,}" for source in sources],
        "  90% at most": [f"{source.ninetieth:,}" for source in sources],
        "  99% at most": [f"{source.ninety_ninth:,}" for source in sources],
        "  longest": [f"{source.longest:,}" for source in sources],
        "tokens to learn, mean": [f"{source.learned / max(1, source.samples):.1f}" for source in sources],
        "positions of an epoch": [f"{round(source.tokens * source.weight):,}" for source in sources],
        "  share": _shares([source.tokens * source.weight for source in sources]),
        "tokens to learn of an epoch": [f"{round(source.learned * source.weight):,}" for source in sources],
        "  share ": _shares([source.learned * source.weight for source in sources]),
        "cut at the end": [f"{source.cut:,} ({source.cut / max(1, source.samples):.1%})" for source in sources],
        "typed <image> neutralised": [f"{source.neutralised:,}" for source in sources],
        "missing markers added": [f"{source.markers_added:,}" for source in sources],
        "leading answers left out": [f"{source.answers_dropped:,}" for source in sources],
        "rows that can't be used": [f"{source.bad:,}" for source in sources],
    }
    return _filled(table, lines)


def statistics_table(found: Mapping[str, Statistics]) -> Table:
    """What is written in the sources, in words."""
    table = _table("sources", found)
    every = found.values()
    lines = {
        "rows": [f"{one.rows:,}" for one in every],
        **_preferences([(one.pairs, one.rated, one.desirable) for one in every]),
        "rows that can't be used": [f"{one.bad:,}" for one in every],
        "with pictures": [f"{one.with_pictures:,}" for one in every],
        "different pictures": [f"{one.pictures:,}" for one in every],
        "pictures per row": [_turns(one.pictures_per_row) for one in every],
        "different questions": [f"{one.different_questions:,}" for one in every],
        "answers": [f"{one.answers:,}" for one in every],
        "different answers": [f"{one.different_answers:,}" for one in every],
        "answers per row": [_turns(one.answers_per_row) for one in every],
        "words of a row: mean, 90%, longest": [_spread(one.words) for one in every],
        "  of an answer": [_spread(one.answer_words) for one in every],
        **_rejected(list(every)),
        "always the same answer": [f"{one.majority:.1%}" for one in every],
    }
    return _filled(table, lines)


def picture_table(found: Mapping[str, PictureStatistics]) -> Table:
    """Sizes of pictures, and what is there twice."""
    table = _table("pictures", found)
    every = found.values()
    lines = {
        "different pictures": [f"{one.pictures:,}" for one in every],
        "can't be read": [f"{one.unreadable:,}" for one in every],
        "shorter side: smallest, 10%, 50%, 90%, largest": [_quantiles(one.shorter) for one in every],
        "longer side": [_quantiles(one.longer) for one in every],
        "longer by shorter": [_quantiles(one.aspect) for one in every],
        "higher than wide": [f"{one.portrait / max(1, one.pictures - one.unreadable):.1%}" for one in every],
        "same under another name": ["--content" if one.repeated is None else f"{one.repeated:,}" for one in every],
        "rows like an earlier one": [f"{one.repeated_rows:,}" for one in every],
    }
    return _filled(table, lines)


def token_table(found: Mapping[str, TokenStatistics], rows: Mapping[str, int], max_length: int | None) -> Table:
    """Tokens of texts."""
    table = _table("tokens of text, without template and pictures", found)
    every = found.values()
    lines = {
        "all": [f"{one.tokens:,}" for one in every],
        "  share": _shares([one.tokens for one in every]),
        "of answers": [f"{one.answers:,}" for one in every],
        "of a row: smallest, 10%, 50%, 90%, largest": [_quantiles(one.row) for one in every],
        "  of its answers": [_quantiles(one.answer) for one in every],
    }
    if max_length is not None:
        lines[f"rows with more than {max_length}"] = [
            f"{one.longer or 0:,} ({(one.longer or 0) / max(1, rows[name]):.1%})" for name, one in found.items()
        ]
    return _filled(table, lines)


def mixture_table(parts: Mapping[str, Part]) -> Table:
    """What of each source is in a mixture."""
    table = _table("mixture", parts)
    every = parts.values()
    lines = {
        "rows": [f"{one.rows:,}" for one in every],
        "weight": [f"{one.weight:g}" for one in every],
        "rows of the mixture": [f"{one.written:,}" for one in every],
        "  share": _shares([one.written for one in every]),
        "  different ones": [f"{one.different:,}" for one in every],
        "not in it": [f"{one.left_out:,}" for one in every],
        "can't be used": [f"{one.bad:,}" for one in every],
    }
    return _filled(table, lines)


def _table(title: str, names: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    return table


def _filled(table: Table, lines: Mapping[str, Sequence[str]]) -> Table:
    for label, values in lines.items():
        table.add_row(label, *values)
    return table


def _shares(counts: Sequence[float]) -> list[str]:
    return [f"{count / (sum(counts) or 1):.1%}" for count in counts]


def _quantiles(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values) or "none"


def _preferences(counts: Sequence[tuple[int, int, int]]) -> dict[str, list[str]]:
    """Lines for (pairs, rated, desirable), as far as there are such."""
    lines: dict[str, list[str]] = {}
    if any(pairs for pairs, _, _ in counts):
        lines["  pairs of answers"] = [f"{pairs:,}" for pairs, _, _ in counts]
    if any(rated for _, rated, _ in counts):
        lines["  rated desirable"] = [f"{desirable:,}" for _, _, desirable in counts]
        lines["  rated undesirable"] = [f"{rated - desirable:,}" for _, rated, desirable in counts]
    return lines


def _rejected(every: Sequence[Statistics]) -> dict[str, list[str]]:
    """Where chosen answers are longer, or shorter, length alone tells them from the others."""
    if not any(one.pairs or one.rated for one in every):
        return {}
    return {"  of a rejected or undesirable one": [_spread(one.rejected_words) for one in every]}


def common_answers(name: str, found: Statistics) -> str:
    """One line with the most common answers."""
    told = ", ".join(f"{_short(answer)!r} {count / found.answers:.1%}" for answer, count in found.common)
    return f"{name}: most common answers: {told or 'none'}"


def shared_pictures(first: str, second: str, found: Shared) -> str:
    """One line on the pictures that two sources both show."""
    if not found.pictures:
        return f"no picture of '{second}' is in '{first}'"
    one, other = found.examples[0]
    example = other if one == other else f"{other} is {one}"
    return f"{found.pictures} pictures of '{second}' ({found.rows} rows) are in '{first}', too; the first: {example}"


def _turns(per_row: Mapping[int, int]) -> str:
    if len(per_row) <= 3:
        return ", ".join(f"{answers}: {rows:,}" for answers, rows in per_row.items())
    return f"{min(per_row)} to {max(per_row)}"


def _spread(spread: Spread) -> str:
    return f"{spread.mean:.1f}, {spread.ninetieth}, {spread.longest}"


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}…"
