"""Models, a capsule and a store for the tests of prompts that are read through an image store."""

import copy
from pathlib import Path

import pytest
from support.builders import transform_capsule
from support.family_models import built
from support.stored_prompts import ROOM, TILE, Setting, number

from kvcapsule import ImageStore
from kvcapsule.capsule.capsule import Capsule


@pytest.fixture(params=["llava", "qwen2_vl", "qwen2_5_vl"])
def setting(request: pytest.FixtureRequest) -> Setting:
    return Setting(built(number(request.param)))


@pytest.fixture
def llava() -> Setting:
    of = built(number("llava"))
    return Setting(of, copy.deepcopy(of.model))


@pytest.fixture
def capsule(llava: Setting) -> Capsule:
    return transform_capsule(llava.of.geometry, TILE)


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "store", max_bytes=ROOM)
