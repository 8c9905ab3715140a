"""The packaged manifest of the suite: seed, task splits and digests, from which the suite is made again and compared."""

from __future__ import annotations

import itertools
from typing import Any

from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.research.tasks.manifest import SPECS_FORMAT, Entry, Manifest, prefixes, short_digest
from t2l_engine.research.tasks.rows import check_text
from t2l_specs.suite import EXAMPLES, SPECIFICATIONS, VERSION, Placed, digest, stream, suite, task

ABOUT = "Specifications made by code, with tiers by unseen parameters (sibling) and unseen families (novel)."
#: Task split -> its name in the manifest.
_STORED = {"train": "train", "in-family": "sibling", "out-of-family": "novel"}


def build(specifications: int = SPECIFICATIONS, seed: int = 0) -> dict[str, Any]:
    """The JSON of the manifest of a suite: for each task split and kind of novelty, name -> digest."""
    tiers: dict[str, dict[str, str]] = {}
    for placed in suite(specifications, seed):
        tiers.setdefault(_tier(placed), {})[placed.spec.name] = digest(placed.spec, seed)
    tiers = {name: dict(sorted(found.items())) for name, found in sorted(tiers.items())}
    return {"format": SPECS_FORMAT, "about": ABOUT, "version": VERSION, "seed": seed, "tiers": tiers}


def read(values: dict[str, Any], examples: int | None, where: str) -> Manifest:
    """The manifest of the suite whose JSON is ``values``; its tasks have ``examples`` examples each (None: EXAMPLES).

    Raises ConfigError naming ``where`` if it is not what this version of the package makes of its seed.
    """
    tiers, seed = values.get("tiers"), values.get("seed")
    if values.keys() != {"format", "about", "version", "seed", "tiers"} or values["version"] != VERSION:
        raise ConfigError(f"{where}: expected format, about, version {VERSION}, seed and tiers, got {short_repr(values)}")
    check_text(f"{where}: about", values["about"])
    if type(seed) is not int or not isinstance(tiers, dict) or not all(isinstance(t, dict) for t in tiers.values()):
        raise ConfigError(f"{where}: expected a number as seed and objects as tiers, got {short_repr(values)}")
    wanted = {name: (tier, found) for tier, names in tiers.items() for name, found in names.items()}
    if not wanted or len(wanted) != sum(map(len, tiers.values())):
        raise ConfigError(f"{where}: tiers: expected specifications, each in one tier, got {short_repr(tiers)}")
    entries = {}
    for placed in itertools.islice(stream(seed), len(wanted)):  # ends at the first that is not as wanted
        spec = placed.spec
        made = _tier(placed), digest(spec, seed)
        if wanted.get(spec.name) != made:
            found = short_repr(wanted.get(spec.name))
            raise ConfigError(f"{where}: {spec.name}: expected {found}, this package makes {made}")
        of = task(spec, EXAMPLES if examples is None else examples, seed)
        about = spec.family.name, placed.task_split, "t2l tasks synthetic --suite specs", ("Apache-2.0",), True
        splits = {name: frozenset(found) for name, found in prefixes(of).items()}
        entries[spec.name] = Entry(*about, splits, short_digest(of.descriptions))
    return Manifest(values["about"], entries)


def _tier(placed: Placed) -> str:
    return _STORED[placed.task_split] + (f", new {placed.new}" if placed.new else "")
