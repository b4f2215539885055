"""A few hundred damaged files of tests/fuzz_pte.py; the whole run is 10,000."""

from __future__ import annotations

import fuzz_pte


def test_damaged_files_neither_crash_nor_hang_nor_answer_wrongly():
    failures, counts = fuzz_pte.fuzz(range(300))
    assert not failures, "\n".join(map(str, failures))
    refused = {key[:2] for key in counts if key[2] == "error"}
    for kind in ("sealed", "inside", "forged"):
        assert {(kind, "load"), (kind, "decode")} <= refused
    assert ("inside", "stock") in refused


def test_files_without_a_seal_neither_crash_nor_hang():
    failures, _ = fuzz_pte.fuzz(range(60), unsealed=True)
    assert not failures, "\n".join(map(str, failures))
