"""Lamina against QEMU's tools, in paired runs: ``python -m bench``."""
