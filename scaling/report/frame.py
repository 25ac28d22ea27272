"""The frame of every figure: palette, style, two panels over a caption, and files that are the same bytes each time."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from recscale.scaling.records.files import write_atomically

from .captions import wrapped

# Okabe and Ito: colours that stay apart under every common colour blindness; black is kept for the truth.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Seven, so that colour and marker together repeat only after 42 architectures.
MARKERS = ("o", "s", "^", "D", "v", "P", "p")
GREY = "#555555"
DPI = 150

# A caption line, the first of a text behind a (colour, marker).
CaptionLine = tuple[tuple[str, str] | None, str]

_STYLE = Path(__file__).with_name("figures.mplstyle")
_WIDTH, _PANEL, _TITLE, _XLABEL, _KEY, _LINE = 10.5, 3.9, 0.62, 0.56, 0.52, 0.185  # inches


@contextmanager
def style() -> Iterator[None]:
    """Settings of these figures for the length of a `with`; matplotlib's own are untouched."""
    with matplotlib.rc_context(matplotlib.rc_params_from_file(_STYLE, use_default_template=False)):
        yield


def png(figure: Figure) -> bytes:
    """The figure as PNG at 150 dots per inch; its title and caption can be read from the file, line by line."""
    words = "\n".join(text.get_text() for text in figure.texts)
    return _written(figure, "png", dpi=DPI, metadata={"Software": None, "Description": words})


def svg(figure: Figure) -> str:
    """The figure as SVG text, the same bytes for the same figure."""
    return _written(figure, "svg", metadata={"Date": None, "Creator": None}).decode("utf-8")


def save(figure: Figure, stem: Path | str) -> tuple[Path, Path]:
    """Writes `stem.png` and `stem.svg` and returns both paths."""
    stem = Path(stem)
    paths = stem.with_suffix(".png"), stem.with_suffix(".svg")
    write_atomically(paths[0], png(figure))
    write_atomically(paths[1], svg(figure))
    return paths


def _written(figure: Figure, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def two_panels(caption_lines: int) -> tuple[Figure, list[Axes]]:
    """Two panels side by side, above a strip for the key and the given number of caption lines."""
    below = _XLABEL + _KEY + _LINE * caption_lines + 0.12
    height = _TITLE + _PANEL + below
    figure = Figure(figsize=(_WIDTH, height))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        1, 2, left=0.085, right=0.985, top=1 - _TITLE / height, bottom=below / height, wspace=0.2
    )
    return figure, [figure.add_subplot(grid[0, k]) for k in range(2)]


def key(figure: Figure, handles: list, caption_lines: int) -> None:
    """What the drawing means, in a strip between the panels and the caption."""
    bottom = (_LINE * caption_lines + 0.1) / figure.get_figheight()
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.005, bottom),
        ncols=4,
        handlelength=2.6,
        columnspacing=1.8,
        labelspacing=0.35,
        borderpad=0.2,
    )


def mark_of(number: int) -> tuple[str, str]:
    """(colour, marker) of the number-th architecture."""
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]


def title(figure: Figure, text: str) -> None:
    """A bold line at the upper left."""
    figure.text(0.012, 1 - 0.17 / figure.get_figheight(), text, ha="left", va="top", fontsize=11.5, fontweight="bold")


def behind(mark: tuple[str, str] | None, text: str) -> list[CaptionLine]:
    """A text as caption lines, the first one behind a marker."""
    return [(mark if k == 0 else None, line) for k, line in enumerate(wrapped(text))]


def write_caption(figure: Figure, lines: Sequence[CaptionLine]) -> None:
    """Caption lines at the bottom, from `behind`."""
    height = figure.get_figheight()
    for k, (mark, line) in enumerate(lines):
        y = (_LINE * (len(lines) - k) - 0.02) / height
        figure.text(0.024, y, line, color="#222222", fontsize=8.6, ha="left", va="top", parse_math=False)
        if mark is not None:
            colour, marker = mark
            figure.add_artist(Line2D([0.014], [y - 0.075 / height], color=colour, marker=marker, ms=6, lw=0))
