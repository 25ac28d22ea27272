"""What to run next: expected widths of intervals, and which gates a planned sweep cannot pass."""
