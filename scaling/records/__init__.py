"""What a run leaves behind: its record, where it came from, and the settings laid over its configuration."""
