"""A click log on disk as memory-mapped columns, read as request-major batches."""
