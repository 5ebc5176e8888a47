"""Slots: every one comes back, and each tenant has a number of its own."""

from decar.server.gateway.slots import Slots


def test_the_slot_that_was_freed_last_is_taken_first_with_a_new_generation() -> None:
    slots = Slots(2)
    generations = []
    with slots.take() as first:
        with slots.take() as second:
            assert {first, second} == {0, 1}
            assert slots.in_use == 2
            generations.append(slots.next_generation())
        with slots.take() as again:
            assert again == second
            generations.append(slots.next_generation())
    assert slots.in_use == 0
    assert generations == [1, 2]
