"""Fails when it is imported, as a package does whose own requirement is missing."""

import surely_not_installed  # noqa: F401
