"""What ``info`` tells about a LUKS1 header, in the words of QEMU's schema."""

from __future__ import annotations

from lamina.ciphers.luks.header import Header
from lamina.ciphers.luks.volume import CipherSpec
from lamina.hints import Any


def describe(header: Header, *, detached: bool) -> dict[str, Any]:
    spec = CipherSpec.of(header)
    bits = header.key_bytes * (4 if spec.mode == "xts" else 8)
    told: dict[str, Any] = {
        "ivgen-alg": spec.iv,
        "detached-header": detached,
        "hash-alg": header.hash,
        "cipher-alg": header.cipher if header.cipher == "sm4" else f"{header.cipher}-{bits}",
        "uuid": header.uuid,
    }
    if spec.iv_hash is not None:
        told["ivgen-hash-alg"] = spec.iv_hash
    told["cipher-mode"] = spec.mode
    told["slots"] = [
        {
            "active": True,
            "iters": slot.iterations,
            "key-offset": slot.offset,
            "stripes": slot.stripes,
        }
        if slot.active
        else {"active": False, "key-offset": slot.offset}
        for slot in header.slots
    ]
    told["payload-offset"] = header.payload_offset
    told["master-key-iters"] = header.digest_iterations
    return told
