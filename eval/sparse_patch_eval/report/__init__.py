"""Pages, tables and figures of runs and of one inspected prompt."""
