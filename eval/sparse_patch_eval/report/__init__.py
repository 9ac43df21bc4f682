"""Pages, tables and figures that people read, of runs and of one inspected prompt."""
