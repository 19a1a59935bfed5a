"""The only code that touches ``comfy.*``: everything host-specific behind plain functions."""
