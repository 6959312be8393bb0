"""What an answer says: content, reasoning and calls of tools, in the formats that models write them in.

::

    chat template -> choose.py -> AnswerFormat -> structural_tag(asked): what the answer is held to
                                              -> parser(asked): text in pieces -> events

A format of calls (`ToolFormat`) is two halves of one thing: the structural tag by which the grammar lets calls through,
and the reader that finds them in the text again. What the one writes the other reads: the tests walk through the
grammars at random.
"""
