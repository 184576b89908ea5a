"""A run's files: steps, trace, revisions, archives. It is told facts and knows no model."""
