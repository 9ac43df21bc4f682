"""Density over all attention calls or layers; exact ones count as 1."""

from __future__ import annotations

from collections.abc import Iterable

from sparse_patch import Report

__all__ = ["exact_share", "mean_density", "overall_density", "whole_density"]


def overall_density(kept: float, sparse: int, exact: int) -> float | None:
    """Mean over sparse calls, whose densities sum to `kept`, and exact ones; None without calls."""
    calls = sparse + exact
    return (kept + exact) / calls if calls else None


def mean_density(densities: Iterable[float | None]) -> float:
    """Mean of at least one density; None is an exact call."""
    kept = [1.0 if density is None else density for density in densities]
    return sum(kept) / len(kept)


def whole_density(report: Report) -> float:
    """Density over all layers of one prefill."""
    return mean_density(layer.density for layer in report.layers)


def exact_share(report: Report) -> float:
    """Share of the layers of one prefill that ran exact."""
    return sum(layer.density is None for layer in report.layers) / len(report.layers)
