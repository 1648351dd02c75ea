"""What people look at: the terminal and the run report. Reads a run directory and `types`."""
