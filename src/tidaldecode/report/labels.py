"""How numbers are written in figures and tables."""

from __future__ import annotations


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


def percent(share: float, digits: int = 3) -> str:
    """`10 %`, which no line break parts."""
    return f"{share * 100:.{digits}g}\N{NO-BREAK SPACE}%"


def signed(value: float) -> str:
    """`+0.032`: with a sign and a true minus."""
    return f"{value:+.3f}".replace("-", "−")


def ratio(value: float | None) -> str:
    """`2.53×`, or nothing."""
    return "" if value is None else f"{value:,.2f}×"
