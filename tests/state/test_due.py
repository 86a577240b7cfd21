import torch
from torch import Tensor

from vllm_shadowkv.state.due import DueBlocks


def pages(*ids: int) -> Tensor:
    return torch.tensor(ids, dtype=torch.int32)


def three() -> DueBlocks:
    """The first two have a page in common: a request has hit a part of a block."""
    due = DueBlocks()
    due.add(9, pages(1, 2), 0)
    due.add(8, pages(1, 3), 0)
    due.add(7, pages(4, 5), 64)
    return due


def test_blocks_are_found_by_their_pages() -> None:
    due = three()
    assert due.of_pages([2, 6, 5]) == {9, 7}
    assert due.of_pages([1]) == {9, 8}
    assert due.of_pages([]) == due.of_pages([9]) == set()


def test_blocks_are_taken_once_in_the_order_of_their_completion() -> None:
    due = three()
    assert [*due.take([7, 9, 100])] == [9, 7]
    assert due.take([7, 9]) == {}
    assert due.of_pages([1, 2, 4, 5]) == {8}
    taken = due.take()
    assert [*taken] == [8]
    assert taken[8][0].tolist() == [1, 3]
    assert taken[8][1] == 0
    assert not due
    assert due.take() == {}


def test_what_is_given_to_somebody_else_is_not_due() -> None:
    due = three()
    due.drop([8, 1])
    assert 8 not in due
    assert 9 in due
    assert len(due) == 2
    assert due.of_pages([1]) == {9}


def test_a_block_may_be_completed_again() -> None:
    due = three()
    due.drop([9])
    due.add(9, pages(6, 6), 128)
    assert due[9].tolist() == [6, 6]
    assert due.of_pages([1, 6]) == {8, 9}


def test_a_table_may_be_overwritten() -> None:
    due, table = DueBlocks(), pages(1, 2)
    due.add(9, table, 0)
    table.fill_(-1)
    assert due.take()[9][0].tolist() == [1, 2]
