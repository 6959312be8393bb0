"""The command line: one file per verb. Only this room and `llm.py` put the others together."""
