"""Memory that data is read into."""

_SKIPPED = 64


def new_buffer(length: int) -> bytearray:
    """Zeroes, in a place into which the system copies at full speed.

    Allocators put what is large 16 bytes behind the start of a page. To the first bytes of a page,
    except the very first, many processors by AMD copy at a third of their speed, with the
    instruction that kernels use for it.
    """
    memory = bytearray(_SKIPPED + length)
    del memory[:_SKIPPED]  # nothing is moved: the memory merely begins later
    return memory
