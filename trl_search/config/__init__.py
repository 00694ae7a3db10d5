"""The settings of the agent, of GRPO and of the task, each declared once with its help, and the recipes."""
