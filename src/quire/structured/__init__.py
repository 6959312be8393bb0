"""Answers held to a shape: a JSON Schema, a regular expression, a choice or a grammar becomes a matcher that says, from
any point of an answer, which tokens may come next.

::

    StructuredOutputsParams -> source (one text, `source.py`) -> checked in a process of its own (`checker.py`)
                            -> compiled beside the step loop (`compiler.py`) -> a matcher for each sequence

The compilers and matchers are llguidance's (https://github.com/guidance-ai/llguidance): an Earley parser over lexemes
whose regular expressions are derivatives, built as it goes.
"""
