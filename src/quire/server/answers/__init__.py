"""Answers, whichever door asked: of one sequence, read into its parts, with what they cost."""
