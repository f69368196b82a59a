"""All targets. A new one is a function from bytes to nothing in `targets`, and an entry in its module's TARGETS."""

from collections.abc import Mapping
from pathlib import Path

from fuzz.target import Target
from fuzz.targets import files, gate, http, records, streams, users

TARGETS: Mapping[str, Target] = {
    target.check.__name__: target
    for module in (files, gate, http, records, streams, users)
    for target in module.TARGETS
}

CORPUS = Path(__file__).parent / "corpus"


def corpus(name: str) -> list[Path]:
    """Return the files of a target's corpus: seeds, and what was a finding once."""
    return sorted(path for path in (CORPUS / name).glob("*") if path.is_file())
