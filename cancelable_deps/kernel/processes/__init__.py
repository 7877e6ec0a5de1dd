"""Functions that run in a process of their own: `pool` keeps the processes, `child` is what runs in one."""
