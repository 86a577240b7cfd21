from vllm_shadowkv.state.completed import CompletedBlocks


def test_a_row_goes_on_where_it_ended() -> None:
    completed = CompletedBlocks()
    assert not completed.may_have(0, 3)
    completed.add([7, 8], 200)
    assert completed.may_have(200, 0)
    assert not completed.may_have(199, 0)
    assert not completed.may_have(201, 3)


def test_rejected_drafts_make_it_go_on_earlier() -> None:
    completed = CompletedBlocks()
    completed.add([7], 200)
    assert [completed.may_have(computed, 2) for computed in range(196, 203)] == [False] * 2 + [True] * 3 + [False] * 2


def test_sealed_and_begun_blocks_are_forgotten() -> None:
    completed = CompletedBlocks()
    completed.add([7, 8], 200)
    completed.add([9], 200)
    completed.drop([7, 100])
    assert completed.may_have(200, 0)
    completed.drop([8, 9])
    assert not completed.may_have(200, 0)
    completed.drop([8, 9])
    completed.add([8], 300)
    assert completed.may_have(300, 0)


def test_a_block_is_one_rows() -> None:
    """The planner drops what a row begins before it adds it."""
    completed = CompletedBlocks()
    completed.add([7], 200)
    completed.drop([7])
    completed.add([7], 300)
    assert completed.may_have(300, 0)
    assert not completed.may_have(200, 0)
