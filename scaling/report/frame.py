"""The frame of every figure: palette, styles, panels with a title above and key and caption below, and files that are
the same bytes each time.

Styles: "report" is 10.5 in wide, as on a page; "column" (3.35 in) and "page" (6.9 in) are for papers, 8 pt; "talk" is
for slides.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.text import Text

from recscale.pallas_kernels.names import nearest
from recscale.scaling.records.files import write_atomically

# Okabe and Ito: colours that stay apart under every common colour blindness; black is kept for the truth.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Seven, so that colour and marker together repeat only after 42 architectures.
MARKERS = ("o", "s", "^", "D", "v", "P", "p")
GREY = "#555555"
DPI = 150

# What a file of a kind is written with, so that equal figures are equal bytes.
_FILES: dict[str, dict[str, Any]] = {
    "pdf": {"metadata": {"CreationDate": None}},
    "svg": {"metadata": {"Date": None, "Creator": None}},
    "png": {"dpi": DPI, "metadata": {"Software": None}},
}

# style -> (settings laid over those of `figures.mplstyle`, width and height of one row of panels in inches)
STYLES: dict[str, tuple[str | None, tuple[float, float]]] = {
    "report": (None, (10.5, 4.4)),
    "column": ("publication.mplstyle", (3.35, 2.4)),
    "page": ("publication.mplstyle", (6.9, 2.7)),
    "talk": ("talk.mplstyle", (11.0, 5.2)),
}

_STACKED = 6.0  # panels of a figure narrower than this stand below each other
_SHORTEST = 1.4  # a row of panels is never squeezed below this by what stands around it
_GAP, _EDGE, _MARK = 0.06, 0.05, 0.16  # inches: between strips, at the edge, before a text for its marker

# Text of a caption behind the (colour, marker) of what it is about.
CaptionLine = tuple[tuple[str, str] | None, str]


@contextmanager
def style(name: str = "report") -> Iterator[None]:
    """Settings of these figures for the length of a `with`; matplotlib's own are untouched.

    Raises:
        ValueError: no such style.
    """
    over, _ = _style(name)
    files = ["figures.mplstyle", *([over] if over else [])]
    settings: dict[Any, Any] = {}
    for file in files:
        settings |= matplotlib.rc_params_from_file(Path(__file__).with_name(file), use_default_template=False)
    with matplotlib.rc_context(settings):
        yield


def _style(name: str) -> tuple[str | None, tuple[float, float]]:
    if name not in STYLES:
        raise ValueError(f"there is no style {name!r}{nearest(name, STYLES)}")
    return STYLES[name]


def save(figure: Figure, path: Path | str) -> Path:
    """Writes a figure as what the file's name says: .pdf with its fonts, .svg, or .png at 150 dots per inch.

    Raises:
        ValueError: another ending.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".").lower()
    if kind not in _FILES:
        raise ValueError(f"{path}: a figure is written as {', '.join('.' + known for known in _FILES)}")
    write_atomically(path, figure_bytes(figure, kind))
    return path


def figure_bytes(figure: Figure, kind: str) -> bytes:
    """The file `save` writes; kind "pdf", "svg" or "png". Title and caption can be read from a PNG, line by line."""
    buffer, options = io.BytesIO(), _FILES[kind]
    if kind == "png":
        words = "\n".join(text.get_text() for text in figure.texts)
        options = options | {"metadata": options["metadata"] | {"Description": words}}
    with style():
        figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def mark_of(number: int) -> tuple[str, str]:
    """(colour, marker) of the number-th architecture."""
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]


def sign(label: str, **look: Any) -> Line2D:
    """An entry of a key; grey and without a line unless it says so."""
    return Line2D([], [], label=label, **{"color": GREY, "lw": 0} | look)


def panels(count: int, name: str, figsize: tuple[float, float] | None) -> tuple[Figure, list[Axes]]:
    """A figure with empty panels, side by side or, in a narrow one, below each other."""
    width, height = figsize or _style(name)[1]
    rows = count if width < _STACKED else 1
    figure = Figure(figsize=(width, height if figsize else height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, count // rows, squeeze=False).flat)


def lay_out(
    figure: Figure, title: str, handles: Sequence[Any], caption: Sequence[CaptionLine], *, fixed: bool = False
) -> None:
    """Puts a title above the panels, and below them a key of `handles` and the caption.

    The figure grows by what these take; a fixed one keeps its height as long as the panels keep theirs.
    """
    above = _write(figure, [(None, title)] if title else [], FontProperties(size="large", weight="bold"))
    under = _write(figure, caption, FontProperties(size="small"))
    key, key_height = _key(figure, handles)
    top = _height(figure, above) + (2 * _GAP if above else 0)
    below = _height(figure, under) + key_height + _GAP * (len(under) + (2 if handles else 0)) + (_GAP if under else 0)
    places = [spec for ax in figure.axes if (spec := ax.get_subplotspec()) is not None]
    rows = len({spec.rowspan.start for spec in places})
    height = figure.get_figheight()
    height = max(height, rows * _SHORTEST + top + below) if fixed else height + top + below
    figure.set_size_inches(figure.get_figwidth(), height)
    left = (0, below / height, 1, 1 - (top + below) / height)
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=left))
    _stack(figure, above, height - _GAP)
    lower = below - key_height - (_GAP if handles else 0)
    _stack(figure, under, lower)
    if key is not None:
        key.set_bbox_to_anchor(
            (_EDGE / figure.get_figwidth(), (lower + _GAP / 2) / height), transform=figure.transFigure
        )


def _write(
    figure: Figure, lines: Sequence[CaptionLine], font: FontProperties
) -> list[tuple[Text, tuple[str, str] | None]]:
    """Texts broken into lines as wide as the figure, to be placed by `_stack`."""
    width = figure.get_figwidth()
    left = _EDGE + (_MARK if any(mark is not None for mark, _ in lines) else 0)
    written = []
    for mark, line in lines:
        text = "\n".join(_broken(figure, line, 0.98 * (width - left - _EDGE), font))
        drawn = figure.text(left / width, 0.5, text, ha="left", va="top", fontproperties=font, parse_math=False)
        written.append((drawn, mark))
    return written


def _renderer(figure: Figure) -> RendererAgg:
    """What measures texts."""
    assert isinstance(figure.canvas, FigureCanvasAgg)
    return figure.canvas.get_renderer()


def _broken(figure: Figure, text: str, inches: float, font: FontProperties) -> list[str]:
    """Lines of whole words that are at most so wide; a single longer word stays whole."""
    renderer = _renderer(figure)
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and renderer.get_text_width_height_descent(longer, font, False)[0] <= inches * figure.dpi:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _height(figure: Figure, texts: Sequence[tuple[Text, Any]]) -> float:
    """Inches of all texts together."""
    return sum(text.get_window_extent().height for text, _ in texts) / figure.dpi


def _stack(figure: Figure, texts: Sequence[tuple[Text, tuple[str, str] | None]], top: float) -> None:
    """Places texts below each other from `top` inches downwards, each behind its marker."""
    height = figure.get_figheight()
    for text, mark in texts:
        text.set_y(top / height)
        if mark is not None:
            colour, marker = mark
            middle = top - 0.6 * float(text.get_fontsize()) / 72
            x = (_EDGE + _MARK / 2) / figure.get_figwidth()
            figure.add_artist(Line2D([x], [middle / height], color=colour, marker=marker, lw=0))
        top -= text.get_window_extent().height / figure.dpi + _GAP


def _key(figure: Figure, handles: Sequence[Any]) -> tuple[Legend | None, float]:
    """A key in as many columns as the figure has room for, and its height in inches."""
    for columns in range(min(len(handles), 4), 0, -1):
        key = figure.legend(handles=handles, loc="lower left", ncols=columns, borderaxespad=0, borderpad=0.1)
        # Kept out of the layout of the panels, which is given the room that is left.
        key.set_in_layout(False)
        size = key.get_window_extent(_renderer(figure))
        if size.width <= (figure.get_figwidth() - 2 * _EDGE) * figure.dpi or columns == 1:
            return key, size.height / figure.dpi
        key.remove()
    return None, 0.0
