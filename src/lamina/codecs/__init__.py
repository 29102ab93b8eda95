"""Compression: bytes in, bytes out."""
