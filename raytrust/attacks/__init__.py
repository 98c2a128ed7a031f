"""Attacks: each receives an `Observation` and nothing else."""
