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
@given(sizes, st.sampled_from([4, 64, 128]), st.integers(1, 9), st.integers(1, 140))
@example([0], 128, 1, 132)
@example([0, 0, 0], 128, 3, 1)
@example([128, 0, 129], 128, 2, 2)
def test_every_output_tile_exactly_once(rows_of, block, col_tiles, blocks):
    ends = offsets(rows_of)
    tiles = extension.static().row_tiles(ends, ends[-1], block, col_tiles, blocks)
    covered = set()
    for _, expert, row, rows, col, _ in tiles:
        assert 1 <= rows <= block
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
    tiles = extension.static().row_tiles(ends, ends[-1], block, col_tiles, blocks)
    bound = extension.static().max_row_tiles(ends[-1], len(ends), block)
    assert len(tiles) <= bound * col_tiles
    shares = [sum(tile[0] == b for tile in tiles) for b in range(blocks)]
    assert max(shares) - min(shares) <= 1


@settings(max_examples=200, **QUIET)
@given(st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-9, 900), min_size=1, max_size=40), st.integers(0, 700))
@example([5, 2, 8], 8)
def test_whatever_offs_says_tiles_hold_rows_that_exist_once(offs, rows):
    tiles = extension.static().row_tiles(offs, rows, 64, 1, 1)
    covered = [r for _, _, row, count, _, _ in tiles for r in range(row, row + count)]
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
