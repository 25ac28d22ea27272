"""From a run table to a law on paper: views of the table, figures and one self-contained page."""
