"""The digest of a capsule."""

import hashlib
import json
from dataclasses import fields

import torch

from .. import atomic_files
from .capsule import Capsule

_FACTS = ("metadata", "base_revision")
"""Keys of a capsule's config that are for the reader: they change nothing of what is stored."""


def capsule_digest(capsule: Capsule) -> str:
    """SHA-256, in hex, of what a capsule's config and tensors are: equal capsules have the same, wherever they lie and
    however they were loaded. `metadata`, the base model's revision and codec settings at their default do not count.

    It is computed once for as long as the tensors stay what they are (see kvcapsule.capsule.computed).
    """
    return capsule.computed.get_or_make(capsule, "digest", lambda: _digest(capsule))


def _digest(capsule: Capsule) -> str:
    config = {name: value for name, value in capsule.config.to_dict().items() if name not in _FACTS}
    # A setting that a later version adds has a default that means what its absence meant before.
    defaults = {field.name: field.default for field in fields(capsule.config.codec)}
    config["codec"] = {name: value for name, value in config["codec"].items() if value != defaults[name]}
    digest = hashlib.sha256(json.dumps(atomic_files.plain(config, "config"), sort_keys=True).encode())
    for name, tensor in sorted(capsule.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
