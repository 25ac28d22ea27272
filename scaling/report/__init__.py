"""Reports: the laws fitted to a run table, as plain data, as figures and as one self-contained page."""
