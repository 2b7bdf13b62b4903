"""Alarm audit: ordinary healthy training runs that must stay quiet, and sick ones whose trouble must be named."""
