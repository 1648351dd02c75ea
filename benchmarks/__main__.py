"""Every row of the rollout and sampling benchmarks, or those named by `--rows`.

Each is measured in one run, sides taking turns; a ratio above 1 means that Étude is faster.
"""

from benchmarks import common, gpu, rollout, sampling

if __name__ == "__main__":
    common.main("python -m benchmarks", __doc__, {**rollout.ROWS, **sampling.ROWS, **gpu.ROWS})
