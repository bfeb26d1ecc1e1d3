"""Measurements on a GPU: kernels beside what the hardware can do, and the engine beside its rivals.

    python -m bench.gpu                 everything, into bench/results/gpu.json, a table and a plot
    python -m bench.gpu --dry-run       the same in seconds on a CPU with tiny sizes: does all of it run?

No network is needed: models have the shapes of known ones and random weights. Each contender runs in a process of its
own, one after the other, since each takes the whole GPU.
"""
