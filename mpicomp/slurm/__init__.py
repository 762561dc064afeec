"""Slurm: the job that a process is in, and the script that starts one."""
