"""Llama and its siblings."""
