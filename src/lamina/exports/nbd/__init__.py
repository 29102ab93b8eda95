"""Serving disks over NBD.

A thread for each connection does everything for it: one receive takes as many requests as have
arrived, all of them are read, written and answered together, one send carries all the replies
(``connection.py``, ``serving.py``). ``server.py`` accepts, counts and ends connections; ``Export``
says what there is to be had.
"""

from lamina.exports.nbd.export import Export
from lamina.exports.nbd.server import Limits, Server

__all__ = ["Export", "Limits", "Server"]
