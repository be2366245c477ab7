"""Leaf helpers, engine and checkpoints; import the modules directly, this file stays empty of imports."""
