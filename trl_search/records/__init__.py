"""The records of a run: logs, trajectories with their loss mask, provenance (`docs/logging.md`)."""

from trl_search.records.folder import Run, read_run, read_trajectories

__all__ = ["Run", "read_run", "read_trajectories"]
