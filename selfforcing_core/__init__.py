"""Self Forcing: block-causal few-step video generation.

Import the module you need; importing the package loads nothing.
"""
