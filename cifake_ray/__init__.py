"""Tells AI-generated images from real ones, in bulk, on Ray."""

__version__ = "0.1.0"
