"""Every setting, declared once with its help: the agent's, GRPO's, the task's, and the recipes that hold them."""
