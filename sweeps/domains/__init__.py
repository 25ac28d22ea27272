"""Studies of domains and tasks, multimodal content, cold items and budgets."""
