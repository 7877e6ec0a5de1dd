"""Functions in worker processes: `pool` manages the processes, `child` is the program that runs in each."""
