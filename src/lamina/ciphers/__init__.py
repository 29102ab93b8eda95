"""Encryption of whole batches of sectors."""
