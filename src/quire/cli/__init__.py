"""The command line: one file per verb. Only this package and `llm.py` put the others together."""
