"""The curves of a run as one PNG: reward, searches, tokens, stop reasons, entropy and reflection over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_search.evaluate import Evaluation

# Panel title -> (metric, label) lines.
PANELS: dict[str, list[tuple[str, str]]] = {
    "Reward": [("reward", "mean"), ("eval/em", "held-out EM")],
    "Searches and turns": [("search/searches", "searches"), ("search/turns", "turns")],
    "How trajectories end": [
        ("stop/answer", "answer"),
        ("stop/search_budget", "search budget"),
        ("stop/token_budget", "token budget"),
        ("stop/end_of_turn", "no answer"),
    ],
    "Tokens a trajectory": [("tokens/model", "policy"), ("tokens/observation", "retrieved (masked)")],
    "Policy entropy": [("entropy", "entropy")],
    "Malformed and reflective": [("search/malformed_calls", "malformed calls"), ("reflection/ratio", "reflective")],
}


def draw_curves(history: Sequence[Mapping[str, Any]], path: Path, measured: Mapping[str, Evaluation]) -> Path:
    """Draws `trainer.state.log_history`; evaluations become horizontal lines beside the reward.

    Returns:
        `Path`: the PNG that was written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axis, (title, lines) in zip(axes.flat, PANELS.items(), strict=True):
        for metric, label in lines:
            points = [(row["step"], row[metric]) for row in history if row.get(metric) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, marker=".", linewidth=1.5)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
    for i, (row, result) in enumerate(measured.items()):
        axes.flat[0].axhline(result.em, linestyle="--", linewidth=1, color=f"C{i + 2}", label=f"EM: {row}")
    for axis in axes.flat:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
