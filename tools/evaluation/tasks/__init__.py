"""Definitions of the tasks, for lm-evaluation-harness: a YAML file each, and their functions."""
