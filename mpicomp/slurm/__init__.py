"""Slurm: the job of this process, and scripts for sbatch."""
