"""Bars, as an SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LABEL, BAR, GAP, MARGIN = 860, 330, 20, 8, 16
OURS, THEIRS, RANGE, INK = "#d9541e", "#7a8ca3", "#1f2933", "#1f2933"


@dataclass(frozen=True, slots=True)
class Bar:
    label: str
    value: float
    least: float
    most: float
    is_ours: bool


def bar_chart(title: str, bars: Sequence[Bar]) -> str:
    """One bar below the other, each with its value and a line from the least to the most."""
    height = 2 * MARGIN + 28 + len(bars) * (BAR + GAP)
    scale = (WIDTH - LABEL - MARGIN - 90) / max(bar.most for bar in bars)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
        f'font-size="13" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{MARGIN}" y="{MARGIN + 14}" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]
    for place, bar in enumerate(bars):
        top = MARGIN + 28 + place * (BAR + GAP)
        middle, text = top + BAR / 2, top + BAR - 5
        colour = OURS if bar.is_ours else THEIRS
        least, end, most = (LABEL + value * scale for value in (bar.least, bar.value, bar.most))
        lines += [
            f'<text x="{LABEL - 8}" y="{text}" text-anchor="end">{escape(bar.label)}</text>',
            f'<rect x="{LABEL}" y="{top}" width="{end - LABEL:.1f}" height="{BAR}" fill="{colour}"/>',
            f'<path d="M{least:.1f} {middle}H{most:.1f}" stroke="{RANGE}" stroke-width="1.5"/>',
            f'<text x="{max(end, most) + 6:.1f}" y="{text}">{bar.value:,.0f}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])
