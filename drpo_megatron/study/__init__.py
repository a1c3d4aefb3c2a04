"""The laboratory: a grid of runs from one file, and what came out of them in one page.

file.py     a study file -> cells -> runs, everything checked before anything starts
cells.py    what lies in a run's directory: finished, to be resumed, or made by another config or code
runner.py   processes, N at a time
results.py  numbers of finished runs;  claims.py  the paper's claims by stated rules
figures.py, page.py, report.py  pictures and the HTML page
"""
