"""The verb `doctor`: what would stop or slow down a run, found on all its ranks before it starts.

`checks.py` has the list of checks and runs them, `meeting.py` is how ranks hear of one another, and
`report.py` the table; each other file has the checks of one theme.
"""
