"""The least values of settings."""

from __future__ import annotations

from trl_search.common.errors import UserError


def check_least(settings: object, **least: float) -> None:
    """Raises `UserError` for a value below its least one, and for NaN. `None`, no limit, may stay.

    Example:
        >>> check_least(SearchGRPOConfig(log_trajectories=-1), log_trajectories=0)
        UserError: log_trajectories=-1 must be at least 0
    """
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and not value >= bound:  # NaN is not, either
            raise UserError(f"{name}={value} must be at least {bound}")
