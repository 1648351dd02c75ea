"""Benchmarks against other libraries: each prints ratios, both sides measured in one run.

common.py     how anything is measured: one worker process per side, alternating runs, medians
scripted.py   episodes whose every token is forced, so that both sides do the same work
rollout.py    the benchmark of multi-turn rollouts: `python -m benchmarks.rollout`
etude_*.py    our side of each benchmark, a worker process
peers/        the other sides, each in a virtual environment of its own
"""
