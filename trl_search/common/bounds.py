"""Bounds of numbers that a user gives. `None`, no limit, is within all of them; NaN is within none."""

from __future__ import annotations

import math

from trl_search.common.errors import UserError


def check_minima(settings: object, **minima: float) -> None:
    """Raises `UserError` for an attribute of `settings` below its minimum. For values, see [`check_at_least`].

    Example:
        >>> check_minima(SearchGRPOConfig(log_trajectories=-1), log_trajectories=0)
        UserError: log_trajectories=-1 must be at least 0
    """
    for name, bound in minima.items():
        check_at_least(bound, **{name: getattr(settings, name)})


def check_at_least(least: float, **values: float | None) -> None:
    """Raises `UserError` for a value below `least`.

    Example:
        >>> check_at_least(1, limit=0)
        UserError: limit=0 must be at least 1
    """
    for name, value in values.items():
        if value is not None and not value >= least:
            raise UserError(f"{name}={value} must be at least {least}")


def check_positive(**values: float | None) -> None:
    """Raises `UserError` for a value that is not a finite number above 0."""
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name}={value} must be a finite number above 0")


def check_not_negative(**values: float | None) -> None:
    """Raises `UserError` for a value that is not a finite number of at least 0."""
    for name, value in values.items():
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"{name}={value} must be a finite number, at least 0")


def check_share(**values: float | None) -> None:
    """Raises `UserError` for a value that is not a number from 0 to 1."""
    for name, value in values.items():
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"{name}={value} must be a number from 0 to 1")


def check_positive_share(**values: float | None) -> None:
    """Raises `UserError` for a value that is not a number above 0 and at most 1, or is `None`."""
    for name, value in values.items():
        if value is None or not 0 < value <= 1:
            raise UserError(f"{name}={value} must be more than 0 and at most 1")
