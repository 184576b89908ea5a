"""Steps, nodes and numbers in plain words, for Studio, logs and the terminal alike."""
