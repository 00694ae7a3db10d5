"""What a run leaves behind: its logs, its trajectories with their mask, what made it (`docs/logging.md`)."""

from trl_search.records.folder import Run, read_run, read_trajectories

__all__ = ["Run", "read_run", "read_trajectories"]
