"""The library's own loop, the run directory, checkpoints, devices."""
