"""The NBD protocol, both sides, without sockets.

The handshake (``negotiation_client``, ``negotiation_server``) is written as generators: they yield
what is to be sent or how many bytes they want next, and ``steps.run`` carries that out on whatever
carries bytes. The transmission phase (``transmission_client``, ``transmission_server``) is made of
readers that say into which buffers the next bytes belong, the buffers of the requests themselves
among them, so that payloads are never copied on their way; and of writers of headers.

Everything follows the protocol's own document, ``doc/proto.md`` of NetworkBlockDevice/nbd.
"""
