"""How numbers look on the page: rounded, with their unrounded value behind them."""

from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from pursuhint_lib.comparison import MINUS, in_points

DASH = "\N{EN DASH}"


def templates(*, html: bool) -> Environment:
    """Jinja for the templates beside this module, without filters: of a page, where text is escaped, or of a text."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not html,
    )


def environment() -> Environment:
    """Jinja with the filters of this module."""
    made = templates(html=True)
    made.filters |= {
        "percent": lambda x: _number(x, f"{_percent(x)}\u202f%"),
        "percent_range": lambda ends: _range(ends, _percent, f"\u2009{DASH}\u2009"),
        "points": lambda x: _number(x, in_points(x)),
        "points_range": lambda ends: _range(ends, in_points, " to "),
        "whole": lambda x: _number(x, f"{x:,.0f}"),
        "points_of": lambda x: _number(x, f"{100 * x:.2f}"),
        "plain": lambda x: _number(x, f"{x:,}"),
        "one_decimal": lambda x: _number(x, f"{x:.1f}"),
        "measure": lambda x, kind: _number(
            x, f"{MEASURED[kind](x)}\u202f%" if kind == "percent" else MEASURED[kind](x)
        ),
        "measure_range": lambda ends, kind: _range(ends, MEASURED[kind], f"\u2009{DASH}\u2009"),
        "tenths_range": lambda ends: _range(ends, lambda x: f"{x:.1f}", f"\u2009{DASH}\u2009"),
        "signed": lambda x: _number(x, in_points(x / 100)),
        "p": lambda x: _number(x, f"{x:.3f}" if x >= 0.001 else "<\u20090.001"),
        "milliseconds": lambda x: _number(x, f"{x:,.2f}"),
        "megabytes": lambda x: _number(x / 1e6, _three_digits(x / 1e6)),
        "milliseconds_range": lambda ends: _range(ends, lambda x: f"{x:,.2f}", f"\u2009{DASH}\u2009"),
        "decimal_range": lambda ends: _range(ends, _decimal, f"\u2009{DASH}\u2009"),
        "decimal": lambda x: _number(x, _decimal(x)),
        "breakable": lambda name: Markup("<wbr>").join(_pieces(str(name))),
        "seconds": lambda x: _number(x, _three_digits(x)),
    }
    return made


def _number(value: float, text: str) -> Markup:
    """A number with its unrounded value; a dash where there is none."""
    if not np.isfinite(value):
        return Markup('<span class="none" title="not known">{}</span>').format(DASH)
    return Markup('<data value="{}">{}</data>').format(repr(value.item() if hasattr(value, "item") else value), text)


def _range(ends: tuple[float, float], write: Any, between: str) -> Markup:
    low, high = ends
    if not (np.isfinite(low) and np.isfinite(high)):
        return Markup('<span class="none" title="one seed gives no interval">no interval</span>')
    return _number(low, write(low)) + between + _number(high, write(high))


def _three_digits(x: float) -> str:
    return f"{x:,.1f}" if x >= 10 else f"{x:.3g}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}".replace("-", MINUS)


def _decimal(x: float) -> str:
    return f"{x:.3f}".replace("-", MINUS)


def _pieces(name: str) -> list[Markup]:
    """A name in parts between which a line may break."""
    parts = name.replace("_", "_\0").replace(".", ".\0").split("\0")
    return [escape(part) for part in parts]


MEASURED = {"percent": _percent, "decimal": _decimal}
