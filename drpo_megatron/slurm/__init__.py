"""Runs as Slurm jobs: what is checked before a job is submitted, its script, and what the script runs on every node.

files.py         whether other machines can see a path
layout.py        nodes and GPUs shared out to ranks and engines
script.py        the sbatch script
environment.py   on every node, before the ranks start: same versions, same files
ray_node.py      on every node: Ray, with ports and a temporary directory of the job's own
"""
