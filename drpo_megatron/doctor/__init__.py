"""What a run needs of the machine it is on, looked at before it starts: one line a thing, with what to do about it.

finding.py   a line: ok, warn or fail, what was found, what to do
software.py  versions, and whether they go together
gpus.py      GPUs and the links between them and between nodes
machine.py   file system, shared memory, ports, clock, limits
nodes.py     reports of several nodes, and which of them is the odd one out
"""
