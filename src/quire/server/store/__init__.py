"""A store in one SQLite file. The folder can be deleted: the server then keeps nothing between requests."""
