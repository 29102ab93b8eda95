"""Disk images and remote disks, every format and protocol of QEMU's block layer."""
