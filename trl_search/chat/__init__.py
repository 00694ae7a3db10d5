"""Asks an agent questions, and shows it think, search and answer (`trl-search chat`)."""

from trl_search.chat.session import Chat, Reply, load_chat

__all__ = ["Chat", "Reply", "load_chat"]
