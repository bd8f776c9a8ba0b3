"""Parallel training: pipeline schedules as data."""
