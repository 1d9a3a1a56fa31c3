"""Families of models: a folder (or one file) each, which owns all that is particular to it."""
