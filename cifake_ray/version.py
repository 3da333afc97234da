"""The version of this program, as outputs and bundles record it."""

__version__ = "0.1.0"
