"""A short run of the fuzzers of NBD, with a seed that never changes."""

from __future__ import annotations

from tests.fuzz.nbd import fuzz_garbage, fuzz_negotiation, fuzz_replies, fuzz_requests


def test_handshakes() -> None:
    assert 300 < fuzz_negotiation(4000) < 3900


def test_requests() -> None:
    assert 2000 < fuzz_requests(3000) < 18000


def test_replies() -> None:
    assert 1000 < fuzz_replies(3000) < 12000


def test_noise() -> None:
    fuzz_garbage(300)
