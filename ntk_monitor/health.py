"""Health: being written."""
