"""The policy being trained, behind one interface: prompt ids in, sampled ids and their logprobs out."""

from trl_search.policies.base import Policy

__all__ = ["Policy"]
