"""The package's version, and the version of what it does to a record."""

__version__ = "0.2.0"

TRANSFORM_VERSION = 4
"""Part of every fingerprint; raised when the same configuration would give other results."""

JOB_VERSION = 2
"""Part of the name under which values written in place are known; it stays as it is."""
