"""Updates of the table and memory rows that a batch touched."""
