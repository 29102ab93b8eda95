"""Protocols of the network as machines without sockets: "fill this buffer", "send these"."""
