"""Clusters: being written."""
