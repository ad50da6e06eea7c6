"""A memory budget divided between blocks and slots: by hand, and against every division that there is."""

import pytest

from kvcapsule.errors import ConfigError
from kvcapsule.serving.budget import Form, Sizes, divide, sequences

SIZES = Sizes(block=32, block_bytes=1000, tile=160, slot_bytes=250)
FORM = Form(image_tokens=196, text_tokens=60)


def test_hand_worked() -> None:
    # 8 blocks, of which one tile gives back 5.
    assert (FORM.blocks(SIZES), FORM.tiles(SIZES), FORM.blocks_left(SIZES)) == (8, 1, 3)
    assert (FORM.bytes(SIZES), FORM.bytes_left(SIZES)) == (8000, 3250)
    # A null block, 5 blocks for the image that is being computed, and 3250 bytes a sequence.
    found = divide(6000 + 10 * 3250, SIZES, FORM)
    assert (found.slots, found.blocks, found.sequences) == (10, 36, 10)
    assert found.without == 4
    assert found.block_bytes(SIZES) + found.pool_bytes(SIZES) <= 6000 + 10 * 3250


@pytest.mark.parametrize("start", range(32))
def test_tiles_are_those_of_any_phase(start: int) -> None:
    from kvcapsule.serving.image_blocks import tile_blocks

    (run,) = tile_blocks([(start, 196)], SIZES.block, SIZES.tile)
    assert run.tiles >= FORM.tiles(SIZES)


@pytest.mark.parametrize(
    "sizes", [SIZES, Sizes(32, 1000, 32, 1000), Sizes(64, 700, 64, 3), Sizes(32, 10, 96, 20)], ids=str
)
@pytest.mark.parametrize("form", [FORM, Form(576, 100), Form(400, 10, images=2), Form(2880, 900)], ids=str)
@pytest.mark.parametrize("total", [20_000, 57_331, 100_000])
def test_no_other_division_lets_more_run(sizes: Sizes, form: Form, total: int) -> None:
    every = range(total // sizes.slot_bytes + 1)
    best = max(sequences((total - s * sizes.slot_bytes) // sizes.block_bytes, s, sizes, form) for s in every)
    if best < 1:
        with pytest.raises(ConfigError, match="hold no sequence"):
            divide(total, sizes, form)
        return
    found = divide(total, sizes, form)
    assert found.block_bytes(sizes) + found.pool_bytes(sizes) <= total
    # Slots for all: where they save nothing, blocks alone may hold one more.
    assert found.sequences >= best - 1 and (found.sequences == best or sizes.slot_bytes >= sizes.block_bytes)


def test_more_memory_never_holds_less() -> None:
    counts = [divide(total, SIZES, FORM).sequences for total in range(10_000, 200_000, 777)]
    assert counts == sorted(counts) and counts[0] >= 1


def test_a_share_that_is_given() -> None:
    found = divide(100_000, SIZES, FORM, share=0.01)
    # 4 slots: the other sequences stay as they are.
    assert (found.slots, found.blocks) == (4, 99) and found.sequences == 4 + (98 - 12) // 8
    assert divide(100_000, SIZES, FORM).sequences > found.sequences
    assert divide(100_000, SIZES, FORM, share=0.0).sequences == found.without == 12


def test_what_cannot_be_divided() -> None:
    with pytest.raises(ConfigError, match=r"8,999 bytes hold no sequence of 196 visual and 60 other tokens.* 9000 at"):
        divide(8999, SIZES, FORM)
    assert divide(9000, SIZES, FORM).sequences == 1
    with pytest.raises(ConfigError, match="another --pool-share"):
        divide(20_000, SIZES, FORM, share=0.9)
    larger = Sizes(32, 1000, 160, 5001)
    with pytest.raises(ConfigError, match="5,001 bytes as a capsule and 5,000 in blocks"):
        divide(10**6, larger, FORM)
    assert divide(10**6, larger, FORM, share=0.5).slots == 99
    with pytest.raises(ConfigError, match="an image of 100 tokens holds no tile of 160"):
        divide(10**6, SIZES, Form(100, 10))
