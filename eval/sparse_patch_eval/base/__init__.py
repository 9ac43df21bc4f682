"""Parts without models, tasks or runs: rows, files, pages, statistics, the terminal."""
