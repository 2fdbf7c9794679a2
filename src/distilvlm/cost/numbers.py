"""Bytes and seconds for people."""

from __future__ import annotations


def as_bytes(value: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 999.5 * size else f"{value / size:.0f} {unit}"
    return f"{value:.0f} B"


def as_seconds(value: float) -> str:
    """Seconds for people: "0.12 s", "3 min 20 s", "2 h 5 min"."""
    if value < 99.5:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours / 24:.1f} days"
