"""What a run needs before it is submitted: memory, communication and time of every rank, and layouts that would fit.

    parameters.py    parameters, gradients and optimizer states of a rank, from the models' weight rules
    activations.py   what the backward pass keeps, and the loss kernel's workspace
    rollout.py       the engines' weights, KV cache and concurrency
    communication.py bytes that a rank moves in a step, by kind
    step_time.py     an estimate of the time of a step, from the constants in hardware.py
    plan.py          all of it for one recipe; search.py for the layouts that it could have
    built.py         the counts of the model that Megatron really builds, to check parameters.py against

Nothing here needs a GPU, weights or another process but `built.py`, which starts one.
"""
