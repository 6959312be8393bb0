"""The operations that every model is written over, and their providers.

`types` is the contract, `reference` the definition, `cpu` and `cuda` faster ones, `select` chooses once.
"""
