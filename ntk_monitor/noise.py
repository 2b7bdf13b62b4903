"""Noise: being written."""
