"""From scores to blocks, against one-line definitions."""

import torch

from sparse_patch import selection


def test_cover_is_the_smallest_set_strictly_above():
    mass = torch.tensor([[0.125, 0.5, 0.25, 0.125]])
    assert [int(selection.cover(mass, s)) for s in (0.4, 0.5, 0.74, 0.75, 0.9)] == [1, 2, 2, 3, 4]


def test_top_mask_takes_a_count_per_row_and_the_first_of_equals():
    scores = torch.tensor([[1.0, 3, 2, 3], [0, 0, 0, 0]])
    got = selection.top_mask(scores, torch.tensor([3, 2]))
    assert got.int().tolist() == [[0, 1, 1, 1], [1, 1, 0, 0]]
