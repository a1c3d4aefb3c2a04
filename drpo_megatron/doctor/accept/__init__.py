"""The acceptance check of a machine: the whole path, stage by stage, with a report (`drpo-megatron doctor --accept`).

    commands/doctor.py -> runner.py -- a process a stage --> worker.py -> <stage>.py: run(settings, results)
                            |  ends what hangs, names what crashed           |  a check at a time, written at once
                            '-> report.py: gpu-report.json, gpu-report.md  <-'

stage.py     what a stage is, what it is told (Settings) and what it says (Results, Outcome)
stages.py    the list of stages, in their order
identity.py  which machine, which versions: what a report is of
ranks.py     ranks inside a stage
models.py    small models with random weights, samples for them, and what a step should give
others       a stage each

A stage gets the device as an argument; the code is the same on a GPU and on a CPU, where sizes are tiny.
"""
