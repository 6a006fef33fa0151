"""One program per claim; `python -m benchmarks.NAME`. Results are kept as rows of results/*.csv."""
