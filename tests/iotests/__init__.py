"""QEMU's own block tests, run unmodified against our tools."""
