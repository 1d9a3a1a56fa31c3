"""Pruning: single weights that become zero, and structures that go for good, one criterion or structure a file."""
