"""The laboratory: a grid of runs from one file, and what came out of them in one page.

file.py     a study file -> the cells of its grid;  runs.py  their runs, all checked before anything starts
cells.py    what lies in a run's directory: ended, to be resumed, or made by another configuration
runner.py   processes, some at a time;  display.py  what a person sees of it
results.py  numbers of the runs;  claims.py  the paper's claims, by rules that were fixed before
tables.py, figures*.py, page.py, report.py  report.html and report.md
"""
