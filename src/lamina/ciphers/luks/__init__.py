"""LUKS1: the header of an encrypted volume, its key slots, and the cipher of its sectors.

Pure: bytes in, bytes out. The ``luks`` format and the encryption of qcow2 are its users; offsets
are relative to the start of the header, wherever that is stored.
"""
