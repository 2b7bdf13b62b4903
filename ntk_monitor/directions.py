"""Directions: being written."""
