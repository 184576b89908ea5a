"""What the nodes use: models, texts, profiling, criteria, revisions, results. No LangGraph."""
