"""What depth, feedback gain, intermediate error signals and other settings do to learning: many small runs of ep-train.

``python -m benchmarks.deep run TABLE...`` makes the runs that are not there yet (each in a process and a folder of its
own), ``python -m benchmarks.deep report`` writes the tables and plots of docs/results.md from them.
"""
