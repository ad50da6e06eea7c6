"""Segments that lie on the host: which chunks a query loads, what is read of them, and where the bytes are."""

import pytest
import torch
from support.builders import rand

from kvcapsule.kernels.reference import attend
from kvcapsule.methods.host_retrieval import Retrieved
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.segments.segment import Segment, storage_bytes

HEADS, GROUP, DIM = 2, 2, 8


def prefill(valid: torch.Tensor) -> LayerPrefill:
    query, keys, values = (
        rand(*valid.shape[:1], h, valid.shape[1], DIM, seed=h) for h in (HEADS * GROUP, HEADS, HEADS)
    )
    return LayerPrefill(0, query, keys, values, [], valid, DIM**-0.5)


def retrieved(tokens: int = 30, count: int = 2, chunk: int = 8) -> tuple[LayerPrefill, Retrieved]:
    """Head 1 of row 0 and head 0 of row 1."""
    of = prefill(torch.ones(2, tokens, dtype=torch.bool))
    return of, Retrieved.of(of, torch.tensor([0, 1]), torch.tensor([1, 0]), chunk, count)


def of_chunks(
    of: LayerPrefill, row: int, head: int, chunks: list[int], query: torch.Tensor, chunk: int = 8
) -> torch.Tensor:
    """Attention of the head's query heads [G, D] over the tokens of these chunks alone."""
    tokens = [t for c in chunks for t in range(c * chunk, min((c + 1) * chunk, of.keys.shape[2]))]
    keys, values = of.keys[row, head, tokens], of.values[row, head, tokens]
    return torch.stack([(keys @ q * of.scale).softmax(dim=0) @ values for q in query])


UNSEEN = torch.zeros(2, HEADS, 1, DIM, dtype=torch.float64)
NOTHING = Segment(UNSEEN, UNSEEN, torch.arange(2), mask=torch.zeros(2, 1, dtype=torch.bool))
"""A tail of which nothing is seen."""


class TestRetrieval:
    @pytest.mark.parametrize("tokens", [30, 32, 5, 1])
    def test_the_chunks_with_the_highest_scores(self, tokens: int) -> None:
        """Scores one at a time: of each query head a softmax over the means, then the mean over the two."""
        of, segment = retrieved(tokens)
        query = rand(2, HEADS * GROUP, 1, DIM, seed=5) * 2
        out = attend(query, [segment, NOTHING], of.scale)
        chunks = [range(begin, min(begin + 8, tokens)) for begin in range(0, tokens, 8)]
        for row, head in ((0, 1), (1, 0)):
            scores = [0.0] * len(chunks)
            for g in range(GROUP):
                q = query[row, head * GROUP + g, 0]
                each = [
                    float(torch.exp(sum(of.keys[row, head, t] for t in run) / len(run) @ q * of.scale))
                    for run in chunks
                ]
                scores = [s + e / sum(each) / GROUP for s, e in zip(scores, each, strict=True)]
            best = sorted(range(len(chunks)), key=lambda c, got=scores: -got[c])[:2]
            group = query[row, head * GROUP : (head + 1) * GROUP, 0]
            torch.testing.assert_close(
                out[row, head * GROUP : (head + 1) * GROUP, 0], of_chunks(of, row, head, best, group)
            )

    def test_each_entry_finds_the_chunk_that_it_looks_for(self) -> None:
        """Keys of chunk c point along axis c; what is asked for is another chunk in each entry and by each of its query
        heads."""
        valid = torch.ones(2, 32, dtype=torch.bool)
        keys = torch.zeros(2, HEADS, 32, DIM, dtype=torch.float64)
        keys[:, :, torch.arange(32), torch.arange(32) // 8] = 1.0
        of = LayerPrefill(0, keys.repeat_interleave(GROUP, 1), keys, keys, [], valid, 1.0)
        segment = Retrieved.of(of, torch.tensor([0, 1]), torch.tensor([1, 0]), 8, 2)
        query = torch.zeros(2, HEADS, GROUP, 1, DIM, dtype=torch.float64)
        query[0, 1, 0, 0, 3], query[0, 1, 1, 0, 0] = 9.0, 5.0
        query[1, 0, 0, 0, 1], query[1, 0, 1, 0, 2] = 5.0, 9.0
        assert segment.chosen(query, 1.0).tolist() == [[0, 3], [1, 2]]

    def test_a_query_head_with_large_scores_does_not_outvote_the_others(self) -> None:
        """Two query heads of three ask for chunk 1 with small scores, one for chunk 0 with large ones."""
        keys = torch.eye(2, dtype=torch.float64).repeat_interleave(8, 0)[None, None]
        of = LayerPrefill(0, keys.repeat(1, 3, 1, 1), keys, keys, [], torch.ones(1, 16, dtype=torch.bool), 1.0)
        segment = Retrieved.of(of, torch.tensor([0]), torch.tensor([0]), 8, 1)
        query = torch.tensor([[100.0, 0.0], [0.0, 4.0], [0.0, 4.0]], dtype=torch.float64).view(1, 1, 3, 1, 2)
        assert segment.chosen(query, 1.0).tolist() == [[1]]

    @pytest.mark.parametrize("tokens", [30, 32, 5, 1])
    def test_means_by_hand(self, tokens: int) -> None:
        """The last chunk's is over the tokens that it has."""
        of, segment = retrieved(tokens)
        for entry, (row, head) in enumerate(((0, 1), (1, 0))):
            for chunk, begin in enumerate(range(0, tokens, 8)):
                run = range(begin, min(begin + 8, tokens))
                torch.testing.assert_close(
                    segment.means[entry, chunk], sum(of.keys[row, head, t] for t in run) / len(run)
                )
        assert segment.means.shape[1] == -(-tokens // 8)

    def test_all_chunks_are_all_tokens(self) -> None:
        of, segment = retrieved(count=9)
        assert segment.keys.shape[2] == 32
        query = rand(2, HEADS * GROUP, 1, DIM, seed=5)
        out = attend(query, [segment, NOTHING], of.scale)
        for row, head in ((0, 1), (1, 0)):
            group = query[row, head * GROUP : (head + 1) * GROUP, 0]
            torch.testing.assert_close(
                out[row, head * GROUP : (head + 1) * GROUP, 0], of_chunks(of, row, head, [0, 1, 2, 3], group)
            )

    def test_several_new_tokens_read_all(self) -> None:
        of, segment = retrieved(count=1)
        query = rand(2, HEADS * GROUP, 3, DIM, seed=5)
        out = attend(query, [segment, NOTHING], of.scale)
        for row, head in ((0, 1), (1, 0)):
            for step in range(3):
                group = query[row, head * GROUP : (head + 1) * GROUP, step]
                torch.testing.assert_close(
                    out[row, head * GROUP : (head + 1) * GROUP, step], of_chunks(of, row, head, [0, 1, 2, 3], group)
                )

    def test_only_what_was_chosen_is_read(self) -> None:
        """What is not a number in all other chunks, and in the buffer before, does not reach the output."""
        of, segment = retrieved()
        query = rand(2, HEADS * GROUP, 1, DIM, seed=5)
        expected = attend(query, [segment, NOTHING], of.scale)
        chosen = segment.chosen(query.view(2, HEADS, GROUP, 1, DIM), of.scale)
        for entry in range(2):
            for chunk in set(range(4)) - set(chosen[entry].tolist()):
                segment.host.keys[entry, chunk] = torch.nan
                segment.host.values[entry, chunk] = torch.nan
        for buffer in (segment.keys, segment.values):
            assert isinstance(buffer, torch.Tensor)
            buffer.fill_(torch.nan)
        torch.testing.assert_close(attend(query, [segment, NOTHING], of.scale), expected, rtol=0, atol=0)

    def test_bytes(self) -> None:
        """On the device 2 buffers of 16 rows, 4 means and two indices an entry; on the host all rows in whole chunks,
        and the slots."""
        _, segment = retrieved()
        assert storage_bytes(segment.entry_tensors()) == 2 * (2 * 16 * DIM * 8 + 4 * DIM * 8 + 2 * 8)
        assert storage_bytes(segment.host_tensors()) == 2 * (2 * 32 * DIM * 8 + 8)
        assert storage_bytes(segment.parameter_tensors()) == 0

    def test_rows_are_chosen_and_repeated(self) -> None:
        of, segment = retrieved()
        query = rand(2, HEADS * GROUP, 1, DIM, seed=5)
        rows = torch.tensor([1, 1, 0])
        again = segment.select(rows)
        tail = NOTHING.select(rows)
        torch.testing.assert_close(
            attend(query[rows], [again, tail], of.scale), attend(query, [segment, NOTHING], of.scale)[rows]
        )
        assert again.host.keys.data_ptr() == segment.host.keys.data_ptr(), "rows on the host are shared"
        alone = segment.select(torch.tensor([1, 1]))
        assert len(alone.host.keys) == 1, "rows that nobody owns are freed"
        twice = query[[1, 1]]
        torch.testing.assert_close(
            attend(twice, [alone, NOTHING], of.scale), attend(query, [segment, NOTHING], of.scale)[[1, 1]]
        )
        assert alone.select(torch.tensor([], dtype=torch.int64)).owner.numel() == 0

    def test_materialize(self) -> None:
        of, segment = retrieved()
        keys, values = segment.materialize(torch.float64)
        assert segment.tokens == 30
        for found, rows in ((keys, of.keys), (values, of.values)):
            torch.testing.assert_close(found[:, 0], torch.stack([rows[0, 1], rows[1, 0]]), rtol=0, atol=0)

    def test_rows_of_unlike_length_are_refused(self) -> None:
        valid = torch.ones(2, 30, dtype=torch.bool)
        valid[1, :7] = False
        of = prefill(valid)
        with pytest.raises(ValueError, match=r"rows of one length; these have \[30, 23\] tokens"):
            Retrieved.of(of, torch.tensor([0, 1]), torch.tensor([0, 0]), 8, 1)


@pytest.mark.gpu
def test_rows_lie_pinned_on_the_host() -> None:
    of, on_cpu = retrieved()
    moved = LayerPrefill(0, *(x.cuda() for x in (of.query, of.keys, of.values)), [], of.valid.cuda(), of.scale)
    segment = Retrieved.of(moved, torch.tensor([0, 1]).cuda(), torch.tensor([1, 0]).cuda(), 8, 2)
    assert all(t.device.type == "cpu" for t in segment.host_tensors()) and segment.host.keys.is_pinned()
    assert all(t.is_cuda for t in segment.entry_tensors())
    query = rand(2, HEADS * GROUP, 1, DIM, seed=5)
    tail = Segment(NOTHING.keys.cuda(), NOTHING.values.cuda(), NOTHING.owner.cuda())
    torch.testing.assert_close(
        attend(query.cuda(), [segment, tail], of.scale).cpu(), attend(query, [on_cpu, NOTHING], of.scale)
    )
