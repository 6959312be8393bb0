"""For pytest in a copy of the tree: hypothesis draws the same examples each time, and the first that fails is enough.

Without this a fault that hypothesis finds would cost the minutes in which it looks for the smallest example.
"""

from hypothesis import Phase, settings

settings.register_profile("mutation", phases=(Phase.explicit, Phase.generate), derandomize=True, database=None)
settings.load_profile("mutation")  # the profile that tests/conftest.py registers next inherits from it
