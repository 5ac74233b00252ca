from __future__ import annotations

from embedstream.consumer.entries import RawEntry
from embedstream.consumer.hand import Hand
from embedstream.shared.lanes import Lane


def test_what_is_taken_twice_is_fresh_once() -> None:
    hand = Hand()
    one, two = RawEntry(Lane.BULK, b"1-0", {}), RawEntry(Lane.BULK, b"2-0", {})
    assert hand.take([one]) == [one]
    assert hand.take([RawEntry(Lane.BULK, b"1-0", {}, deaths=1), two, two]) == [two]
    assert len(hand) == 2


def test_lanes_have_ids_of_their_own() -> None:
    hand = Hand()
    one, other = (RawEntry(lane, b"1-0", {}) for lane in Lane)
    assert hand.take([one, other]) == [one, other]
    hand.give([one])
    assert one.place not in hand
    assert other.place in hand


def test_letting_go_of_what_is_not_there_is_no_error() -> None:
    hand = Hand()
    hand.give([RawEntry(Lane.BULK, b"1-0", {})])
    assert len(hand) == 0
