"""The package's version, and the version of what it does to a record."""

__version__ = "0.1.0"

TRANSFORM_VERSION = 2
"""Part of every fingerprint; raised when the same configuration would give other results."""
