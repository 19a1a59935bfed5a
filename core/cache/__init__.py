"""Skipping sampling steps whose residual is predictable."""
