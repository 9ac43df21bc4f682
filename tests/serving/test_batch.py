"""A batch is split into its sequences, and put together again."""

import torch

from sparse_patch.serving.batch import Piece, pieces_of, rows_of, starts_of


def test_every_sequence_has_its_rows_and_its_keys():
    decode, fresh, chunk = pieces_of([0, 1, 9, 13], [7, 8, 20])
    assert (decode.q_len, decode.kv_len, decode.is_fresh) == (1, 7, False)
    assert (fresh.start, fresh.stop, fresh.is_fresh) == (1, 9, True)
    assert (chunk.index, chunk.q_len, chunk.kv_len, chunk.is_fresh) == (2, 4, 20, False)


def test_places_without_a_sequence_are_left_out_and_the_others_keep_their_index():
    assert pieces_of([0, 0, 3, 3], [0, 3, 0]) == [Piece(1, 0, 3, 3)]


def test_rows_are_a_slice_where_they_are_one():
    pieces = pieces_of([0, 2, 5, 6], [2, 9, 4])
    assert rows_of(pieces[1:]) == slice(2, 6)
    assert rows_of([pieces[0], pieces[2]]).tolist() == [0, 1, 5]
    assert starts_of([pieces[0], pieces[2]]) == [0, 2, 3]


def test_rows_taken_out_and_put_back_are_where_they_were():
    tokens = torch.arange(12.0).view(6, 2)
    pieces = pieces_of([0, 2, 5, 6], [2, 9, 4])
    rows = rows_of([pieces[0], pieces[2]])
    back = torch.zeros_like(tokens)
    back[rows] = tokens[rows]
    assert torch.equal(back[:2], tokens[:2])
    assert torch.equal(back[5:], tokens[5:])
    assert not back[2:5].any()
