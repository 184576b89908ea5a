"""A pruned model as a directory that loads anywhere."""
