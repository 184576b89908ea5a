"""Texts and questions: found, read row by row, cut into windows of tokens."""
