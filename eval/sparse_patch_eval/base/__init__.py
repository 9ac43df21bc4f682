"""What knows of no model, task or run: rows, files, pages, statistics, the terminal."""
