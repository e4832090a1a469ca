"""The device's tile arithmetic (csrc/tile_scheduler.cuh), the same functions, compiled for the host and driven here."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.cuda import extension

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
QUIET = {"deadline": None, "derandomize": True, "database": None}
sizes = st.lists(st.one_of(st.just(0), st.integers(0, 700)), min_size=1, max_size=40)


def offsets(rows_of: list[int]) -> list[int]:
    ends = [0]
    for n in rows_of:
        ends.append(ends[-1] + n)
    return ends[1:]


@settings(max_examples=200, **QUIET)
@given(sizes, st.sampled_from([4, 64, 128]), st.integers(1, 9), st.integers(1, 70), st.sampled_from([1, 2]))
@example([0], 128, 1, 132, 1)
@example([0, 0, 0], 128, 3, 1, 1)
@example([128, 0, 129], 128, 2, 2, 1)
@example([129, 0, 128], 128, 3, 2, 2)
def test_every_output_tile_exactly_once(rows_of, block, col_tiles, clusters, cluster):
    ends = offsets(rows_of)
    tiles = extension.static().row_tiles(ends, ends[-1], block, col_tiles, clusters * cluster, cluster)
    covered = set()
    for _, expert, row, rows, col, _, _ in tiles:
        if cluster > 1 and rows == 0:  # the second block of a pair that has one tile
            assert col == col_tiles
            continue
        assert 1 <= rows <= block and col < col_tiles
        begin = ends[expert] - rows_of[expert]
        assert begin <= row and row + rows <= ends[expert], "a row of another expert"
        cells = {(r, col) for r in range(row, row + rows)}
        assert not covered & cells, "a row computed twice"
        covered |= cells
    assert covered == {(r, c) for r in range(ends[-1]) for c in range(col_tiles)}


@settings(max_examples=200, **QUIET)
@given(sizes, st.sampled_from([4, 64, 128]), st.integers(1, 9), st.integers(1, 140))
def test_the_worst_case_grid_suffices_and_blocks_share_evenly(rows_of, block, col_tiles, blocks):
    ends = offsets(rows_of)
    tiles = extension.static().row_tiles(ends, ends[-1], block, col_tiles, blocks, 1)
    bound = extension.static().max_row_tiles(ends[-1], len(ends), block)
    assert len(tiles) <= bound * col_tiles
    shares = [sum(tile[0] == b for tile in tiles) for b in range(blocks)]
    assert max(shares) - min(shares) <= 1


@settings(max_examples=200, **QUIET)
@given(sizes, st.sampled_from([4, 64, 128]), st.integers(1, 9), st.integers(1, 70))
def test_blocks_of_a_cluster_walk_in_step(rows_of, block, col_tiles, clusters):
    """Each has as many tiles, of the same expert; where weights are shared, neighbouring row tiles of the same columns,
    and at most one row tile of an expert shares none."""
    ends = offsets(rows_of)
    tiles = extension.static().row_tiles(ends, ends[-1], block, col_tiles, 2 * clusters, 2)
    shares = {}
    for first in range(0, 2 * clusters, 2):
        one, other = ([t[1:] for t in tiles if t[0] == b] for b in (first, first + 1))
        assert len(one) == len(other)
        for (expert, row, _, col, index, shared), second in zip(one, other, strict=True):
            assert second[0] == expert and second[5] == shared
            if shared:
                assert (second[1], second[3], second[4]) == (row + block, col, index + 1)
            else:
                assert (second[1], second[3], second[4]) == (row, col + 1, index)
                shares.setdefault(expert, set()).add(row)
    assert all(len(alone) == 1 for alone in shares.values())


@settings(max_examples=200, **QUIET)
@given(st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-9, 900), min_size=1, max_size=40), st.integers(0, 700))
@example([5, 2, 8], 8)
def test_whatever_offs_says_tiles_hold_rows_that_exist_once(offs, rows):
    tiles = extension.static().row_tiles(offs, rows, 64, 1, 1)
    covered = [r for _, _, row, count, *_ in tiles for r in range(row, row + count)]
    assert covered == list(range(len(covered))) and len(covered) <= rows
    assert len(tiles) <= extension.static().max_row_tiles(rows, len(offs), 64)


@settings(max_examples=100, **QUIET)
@given(sizes, st.sampled_from([4, 64]))
def test_scratch_slots_follow_the_rows(rows_of, block):
    """A row tile's slot in per-tile scratch: 0, 1, 2, … down the rows, so an expert's slots are consecutive."""
    ends = offsets(rows_of)
    tiles = extension.static().row_tiles(ends, ends[-1], block, 1, 1)
    assert [tile[5] for tile in tiles] == list(range(len(tiles)))
    assert [tile[2] for tile in tiles] == sorted(tile[2] for tile in tiles)


@settings(max_examples=100, **QUIET)
@given(st.integers(1, 6), st.integers(1, 20), st.integers(1, 20))
def test_weight_tiles_cover_the_stacked_gradient(experts, row_tiles, col_tiles):
    count = experts * row_tiles * col_tiles
    tiles = [extension.static().weight_tile(i, row_tiles, col_tiles) for i in range(count)]
    assert sorted(tiles) == [(e, r, c) for e in range(experts) for r in range(row_tiles) for c in range(col_tiles)]
