# SPDX-License-Identifier: AGPL-3.0-or-later
"""`scripts/fuzz`: the decoders of ``decoders.py`` under a coverage-guided fuzzer (atheris), which finds its own way into them.

`python -m tests.hostile.fuzz_decoders NAME FOLDER SECONDS`: the corpus lies in FOLDER/NAME and grows from run to run, an
input that breaks the invariant is written to FOLDER. `python -m tests.hostile.fuzz_decoders NAME FILE` runs one such input.
Not part of the tests: those of ``test_fuzz.py`` are the same in every run.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from pathlib import Path

_CUTS = 4


def take(name: str, data: bytes) -> None:
    """Hold a decoder to the invariant; the input's first bytes say where it is cut."""
    decoders = importlib.import_module("tests.hostile.decoders")
    places = [
        int.from_bytes(data[at : at + 2]) % max(1, len(data)) for at in range(0, 2 * _CUTS, 2)
    ]
    decoders.check(decoders.DECODERS[name], data[2 * _CUTS :], places, bytewise=len(data) < 500)


def sow(name: str, folder: Path) -> None:
    """Begin a corpus with what is valid, whole and in part."""
    folder.mkdir(parents=True, exist_ok=True)
    for data in importlib.import_module("tests.hostile.valid").valid()[name]:
        for end in (len(data), len(data) // 2, 300):
            seed = bytes(2 * _CUTS) + data[:end]
            (folder / hashlib.sha256(seed).hexdigest()[:20]).write_bytes(seed)


def main(name: str, where: Path, seconds: int) -> None:
    """Fuzz one decoder. Does not return: the fuzzer ends the process, with 0 if nothing was found."""
    # Only there for this: no dependency of the project.
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["replicator", "bacula_adapter"]):
        importlib.import_module("tests.hostile.decoders")
    corpus = where / name
    sow(name, corpus)
    options = [f"-max_total_time={seconds}", f"-artifact_prefix={where}/{name}-", "-max_len=40000"]
    limits = ["-rss_limit_mb=1024", "-timeout=60", "-verbosity=0", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, *limits, str(corpus)], lambda data: take(name, data))
    atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        take(sys.argv[1], Path(sys.argv[2]).read_bytes())
    else:
        main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
