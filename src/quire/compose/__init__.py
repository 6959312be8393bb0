"""Where the floors are put together: the side that computes, the side that knows text, and both."""
