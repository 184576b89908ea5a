"""Kept weights updated: the inputs of a block, the sweep, least squares."""
