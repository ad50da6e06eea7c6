"""Visual spans are found by placeholders, and told apart by what else the model is given."""

from collections.abc import Callable

import pytest
import torch
from transformers import BatchFeature, LlavaConfig, LlavaForConditionalGeneration, Qwen2_5_VLConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from kvcapsule.vlm.spans import VisualSpan, find_spans

TEXT, IMAGE, VIDEO = 5, 90, 91
LLAVA = LlavaConfig(image_token_index=IMAGE)
QWEN = Qwen2_5_VLConfig(vision_config={"spatial_merge_size": 2}, image_token_id=IMAGE, video_token_id=VIDEO)


def ids(*rows: list[int]) -> torch.Tensor:
    """Rows as lists whose numbers are token ids, padded on the left with 0."""
    longest = max(map(len, rows))
    return torch.tensor([[0] * (longest - len(row)) + row for row in rows])


def test_one_image() -> None:
    assert find_spans(LLAVA, ids([TEXT, *[IMAGE] * 9, TEXT])) == [VisualSpan(0, 1, 9, (1, 3, 3))]


def test_a_length_that_is_no_square_is_one_row() -> None:
    assert find_spans(LLAVA, ids([*[IMAGE] * 6, TEXT])) == [VisualSpan(0, 0, 6, (1, 1, 6))]


def test_several_images_at_both_ends() -> None:
    spans = find_spans(LLAVA, ids([*[IMAGE] * 4, TEXT, *[IMAGE] * 4]))
    assert spans == [VisualSpan(0, 0, 4, (1, 2, 2)), VisualSpan(0, 5, 4, (1, 2, 2))]


def test_left_padded_batch_by_row_and_position() -> None:
    spans = find_spans(LLAVA, ids([TEXT, *[IMAGE] * 4, TEXT], [TEXT, TEXT], [*[IMAGE] * 4, TEXT, *[IMAGE] * 4, TEXT]))
    assert [(s.row, s.start, s.length) for s in spans] == [(0, 5, 4), (2, 0, 4), (2, 5, 4)]


def test_no_image() -> None:
    assert find_spans(LLAVA, ids([TEXT, TEXT])) == []
    assert find_spans(LLAVA, ids([TEXT, TEXT]), {"pixel_values": None}) == []
    assert find_spans(LLAVA, ids([TEXT, TEXT]), {"pixel_values": torch.zeros(2, 3, 8, 8)}) == []
    assert find_spans(QWEN, ids([TEXT, TEXT]), {"image_grid_thw": torch.tensor([[1, 4, 4]])}) == []


def test_images_that_touch_are_told_apart_by_their_number() -> None:
    tokens = ids([TEXT, *[IMAGE] * 12, TEXT], [*[IMAGE] * 4, TEXT])
    spans = find_spans(LLAVA, tokens, {"pixel_values": torch.zeros(4, 3, 8, 8)})
    assert spans == [VisualSpan(row, start, 4, (1, 2, 2)) for row, start in ((0, 1), (0, 5), (0, 9), (1, 9))]
    assert [s.length for s in find_spans(LLAVA, tokens)] == [12, 4]


def test_images_that_touch_are_told_apart_by_their_features() -> None:
    """generate encodes images first, and the forward then has neither pixels nor grids."""
    tokens = ids([TEXT, *[IMAGE] * 10, TEXT], [*[IMAGE] * 4, TEXT])
    uneven = {"image": BaseModelOutputWithPooling(pooler_output=[torch.zeros(n, 8) for n in (4, 6, 4)])}
    spans = find_spans(QWEN, tokens, {"mm_encoder_outputs": uneven})
    assert [(s.row, s.start, s.length) for s in spans] == [(0, 1, 4), (0, 5, 6), (1, 7, 4)]
    even = {"image": BaseModelOutputWithPooling(pooler_output=torch.zeros(7, 2, 8))}
    assert [s.length for s in find_spans(LLAVA, tokens, {"mm_encoder_outputs": even})] == [2] * 7
    for unknown in (torch.zeros(14, 8), torch.zeros(3, 2, 8), None):
        encoded = {"image": BaseModelOutputWithPooling(pooler_output=unknown)}
        assert [s.length for s in find_spans(LLAVA, tokens, {"mm_encoder_outputs": encoded})] == [10, 4]
    assert [s.length for s in find_spans(LLAVA, tokens, {"mm_encoder_outputs": {}})] == [10, 4]


def test_processor_of_a_llava(make_batch: Callable[..., BatchFeature], model: LlavaForConditionalGeneration) -> None:
    batch = make_batch((1, "Read line 2."), (2, "Which of the two?"), (0, "Hello."))
    spans = find_spans(model.config, batch["input_ids"], batch)
    length = batch["input_ids"].shape[1]
    pads = (batch["attention_mask"] == 0).sum(dim=1).tolist()
    assert pads[0] > 0
    assert spans == [VisualSpan(row, pads[row] + start, 196, (1, 14, 14)) for row, start in ((0, 1), (1, 1), (1, 197))]
    assert all(s.start + s.length <= length for s in spans)


def test_grids_with_merged_patches() -> None:
    tokens = ids([TEXT, *[IMAGE] * 6, TEXT, *[IMAGE] * (6 + 4)], [TEXT, TEXT, *[IMAGE] * 4])
    grids = torch.tensor([[1, 4, 6], [1, 6, 4], [1, 4, 4], [1, 2, 8]])
    spans = find_spans(QWEN, tokens, {"image_grid_thw": grids})
    assert spans == [
        VisualSpan(0, 1, 6, (1, 2, 3)),
        VisualSpan(0, 8, 6, (1, 3, 2)),
        VisualSpan(0, 14, 4, (1, 2, 2)),
        VisualSpan(1, 14, 4, (1, 1, 4)),
    ]


def test_video_beside_an_image() -> None:
    tokens = ids([TEXT, *[VIDEO] * 18, TEXT, *[IMAGE] * 4, TEXT])
    grids = {"image_grid_thw": torch.tensor([[1, 4, 4]]), "video_grid_thw": torch.tensor([[3, 4, 6]])}
    assert find_spans(QWEN, tokens, grids) == [VisualSpan(0, 1, 18, (3, 2, 3)), VisualSpan(0, 20, 4, (1, 2, 2))]


def test_placeholders_cut_by_other_tokens_are_spans_of_their_own() -> None:
    """Frames with time stamps between them, rows with separators."""
    frames = ids([TEXT, *[VIDEO] * 6, TEXT, *[VIDEO] * 6, TEXT])
    spans = find_spans(QWEN, frames, {"video_grid_thw": torch.tensor([[2, 4, 6]])})
    assert spans == [VisualSpan(0, 1, 6, (1, 2, 3)), VisualSpan(0, 8, 6, (1, 2, 3))]
    rows = ids([*[IMAGE] * 3, TEXT, *[IMAGE] * 3, TEXT])
    spans = find_spans(LLAVA, rows, {"pixel_values": torch.zeros(1, 3, 8, 8)})
    assert spans == [VisualSpan(0, 0, 3, (1, 1, 3)), VisualSpan(0, 4, 3, (1, 1, 3))]


def test_frames_side_by_side_beside_frames_apart() -> None:
    tokens = ids([*[VIDEO] * 8, TEXT], [*[VIDEO] * 4, TEXT, *[VIDEO] * 4])
    spans = find_spans(QWEN, tokens, {"video_grid_thw": torch.tensor([[2, 4, 4], [2, 4, 4]])})
    assert [(span.row, span.start, span.grid) for span in spans] == [
        (0, 0, (1, 2, 2)),
        (0, 4, (1, 2, 2)),
        (1, 0, (1, 2, 2)),
        (1, 5, (1, 2, 2)),
    ]


def test_frames_too_many_are_refused() -> None:
    tokens = ids([*[VIDEO] * 4, TEXT, *[VIDEO] * 4])
    with pytest.raises(ValueError, match="describe 3 video frames, but the prompt has placeholders for 2"):
        find_spans(QWEN, tokens, {"video_grid_thw": torch.tensor([[3, 4, 4]])})


def test_features_of_a_video_by_frame() -> None:
    encoded = BaseModelOutputWithPooling(pooler_output=[torch.zeros(3, 4, 8), torch.zeros(2, 4, 8)])
    spans = find_spans(QWEN, ids([*[VIDEO] * 20]), {"mm_encoder_outputs": {"video": encoded}})
    assert spans == [VisualSpan(0, 0, 12, (3, 2, 2)), VisualSpan(0, 12, 8, (2, 2, 2))]


def test_positions_tell_the_grid_where_features_do_not() -> None:
    """As generate hands it over: the grid is in the positions alone, behind 2 of padding and 1 of text."""
    tokens = ids([TEXT] * 9, [TEXT, *[IMAGE] * 6])
    positions = torch.zeros(4, 2, 9, dtype=torch.int64)
    positions[1:, 1, 3:] = torch.cartesian_prod(torch.tensor([1]), torch.arange(1, 3), torch.arange(1, 4)).T
    encoded = {"image": BaseModelOutputWithPooling(pooler_output=[torch.zeros(6, 8)])}
    inputs = {"mm_encoder_outputs": encoded, "position_ids": positions}
    assert find_spans(QWEN, tokens, inputs) == [VisualSpan(1, 3, 6, (1, 2, 3))]
    # Positions along one line, as without M-RoPE, make no grid.
    line = torch.arange(9).expand(3, 2, 9)
    assert find_spans(QWEN, tokens, {**inputs, "position_ids": line}) == [VisualSpan(1, 3, 6, (1, 1, 6))]


def test_images_in_patches_are_apart_where_their_sizes_are_alike() -> None:
    tokens, pixels = ids([*[IMAGE] * 8, TEXT]), torch.zeros(2, 3, 3, 8, 8)
    alike, unlike = torch.tensor([[8, 16], [8, 16]]), torch.tensor([[8, 16], [16, 8]])
    assert [s.length for s in find_spans(LLAVA, tokens, {"pixel_values": pixels, "image_sizes": alike})] == [4, 4]
    assert [s.length for s in find_spans(LLAVA, tokens, {"pixel_values": pixels, "image_sizes": unlike})] == [8]


def test_an_image_too_many_is_refused() -> None:
    tokens = ids([TEXT, *[IMAGE] * 6, TEXT])
    with pytest.raises(ValueError, match="describe 2 images, but the prompt has placeholders for 1"):
        find_spans(QWEN, tokens, {"image_grid_thw": torch.tensor([[1, 4, 6], [1, 4, 4]])})


def test_every_placeholder_is_in_exactly_one_span() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.where(torch.rand(4, 60, generator=generator) < 0.6, IMAGE, TEXT)
    marked = torch.zeros_like(tokens)
    for span in find_spans(LLAVA, tokens):
        marked[span.row, span.start : span.start + span.length] += 1
    assert torch.equal(marked, (tokens == IMAGE).long())
