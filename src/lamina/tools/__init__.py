"""The command-line tools, drop-in for QEMU's."""
