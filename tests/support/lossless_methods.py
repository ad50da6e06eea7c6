"""Methods that lose nothing; a test that takes `keeper` runs with each of them."""

from collections.abc import Callable

import pytest

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.methods.method import Method
from kvcapsule.policy import EvenlySpaced, Full, PostVisionAttention

EVERYTHING_KEPT = {
    "full": lambda identity: Full(),
    "tile 49": lambda identity: identity(49),
    "tile 50, the last one incomplete": lambda identity: identity(50),
    "tile 196": lambda identity: identity(196),
    "tile 300, larger than the image": lambda identity: identity(300),
    "tile 49, no frames": lambda identity: identity(49, canonical_frame=False),
    "all tokens, ranked": lambda identity: PostVisionAttention(1.0),
    "all tokens, spaced": lambda identity: EvenlySpaced(1.0),
}


@pytest.fixture(params=EVERYTHING_KEPT)
def keeper(request: pytest.FixtureRequest, identity: Callable[..., Capsule]) -> Method:
    """A method that loses nothing."""
    return EVERYTHING_KEPT[request.param](identity)
