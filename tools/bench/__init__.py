"""The live model of a process, with the weights of any revision."""
