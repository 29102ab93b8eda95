"""Serving disks to others."""
