"""How numbers and values are written in figures and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LONGEST = 160  # characters of a value
_MOST = 8  # items of a list


def budget_label(budget: int | float | None) -> str:
    """`1,024`, `10 %` of the context, or nothing."""
    if budget is None:
        return ""
    return percent(budget) if isinstance(budget, float) else f"{budget:,}"


def budget_words(budget: int | float | None) -> str:
    """`1,024 tokens`, `10 % of the context`, or `all tokens`."""
    if budget is None:
        return "all tokens"
    return f"{budget_label(budget)} {'of the context' if isinstance(budget, float) else 'tokens'}"


def context_label(tokens: int) -> str:
    """`32K` of 32,768, and other counts in full."""
    return f"{tokens:,}" if tokens % 1024 else f"{tokens // 1024:,}K"


def percent(share: float | None, digits: int = 3) -> str:
    """`10 %`, which no line break parts; a dash for what is not known."""
    return "–" if share is None else f"{share * 100:.{digits}g}\N{NO-BREAK SPACE}%"


def share_label(share: float | None) -> str:
    """`25.7%`, as tables of a terminal have it; nothing for what is not known."""
    return "" if share is None else f"{share:.1%}"


def signed(value: float, error: float | None = None) -> str:
    """`+0.032 ± 0.004`: with a sign, a true minus, and the standard error where there is one."""
    return f"{value:+.3f}".replace("-", "−") + ("" if error is None else f" ± {error:.3f}")


def ratio(value: float | None) -> str:
    """`2.53×`, or a dash."""
    return "–" if value is None else f"{value:,.2f}×"


def counted(count: int, what: str) -> str:
    """`1 window`, `10 windows`."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def flattened(fields: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Names and values as text, those of objects in objects with both names: `full.decode ms per token`."""
    found: dict[str, str] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            found |= flattened(value, f"{prefix}{name}.")
        else:
            found[(prefix + name).replace("_", " ")] = written(value)
    return found


def written(value: Any) -> str:
    """A value for a table: whole where it is short."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e6 <= abs(value) < 1e15 else f"{value:,.6g}"
    if isinstance(value, list):
        short = len(value) <= _MOST and not any(isinstance(item, list | dict) for item in value)
        return ", ".join(map(written, value)) if short else f"{len(value)} values"
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
