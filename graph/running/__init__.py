"""Who runs the graph, and where: in a process, step by step, in Studio, many for a comparison."""
