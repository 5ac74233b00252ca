from __future__ import annotations

from embedstream.consumer.watchdog import PREDICTION_FACTOR, UNKNOWN_FACTOR, State, Watchdog


def looks(watchdog: Watchdog, times: int, passed_s: float = 1.0, *, turn: bool = True) -> list[State]:
    """What it thinks at each of some looks; the loop turns before each of them."""
    states = []
    for _ in range(times):
        if turn:
            watchdog.turn()
        states.append(watchdog.look(passed_s))
    return states


def test_what_has_nothing_to_do_moves() -> None:
    assert set(looks(Watchdog(2), 100)) == {State.MOVING}


def test_a_batch_that_does_not_end_is_hung_then_lost() -> None:
    watchdog = Watchdog(3)
    watchdog.begin(0.1)
    states = looks(watchdog, 8)  # the first look begins to count
    assert states == [State.MOVING] * 4 + [State.HUNG] * 3 + [State.LOST]


def test_it_moves_again_when_the_batch_ends() -> None:
    watchdog = Watchdog(3)
    watchdog.begin(0.1)
    assert looks(watchdog, 6)[-1] is State.HUNG
    watchdog.end()
    assert looks(watchdog, 1) == [State.MOVING]
    watchdog.begin(0.1)  # what it had counted is no part of the next batch
    assert looks(watchdog, 4) == [State.MOVING] * 4


def test_batches_that_follow_each_other_are_not_one() -> None:
    watchdog = Watchdog(3)
    for _ in range(20):
        watchdog.begin(0.1)
        assert looks(watchdog, 2) == [State.MOVING] * 2
        watchdog.end()
    watchdog.begin(0.1)
    assert looks(watchdog, 3) == [State.MOVING] * 3


def test_a_batch_may_take_as_long_as_was_predicted_and_more() -> None:
    watchdog = Watchdog(3)
    watchdog.begin(10)
    states = looks(watchdog, int(10 * PREDICTION_FACTOR) + 3)
    assert states[-3:] == [State.MOVING, State.HUNG, State.HUNG]


def test_the_first_batch_may_take_longer() -> None:
    watchdog = Watchdog(3)
    watchdog.begin(None)
    states = looks(watchdog, int(3 * UNKNOWN_FACTOR) + 3)
    assert states[-3:] == [State.MOVING, State.HUNG, State.HUNG]


def test_a_long_batch_is_no_excuse_for_the_loop() -> None:
    watchdog = Watchdog(3)
    watchdog.begin(1000)
    watchdog.turn()
    assert looks(watchdog, 8, turn=False) == [State.MOVING] * 4 + [State.HUNG] * 3 + [State.LOST]
    assert looks(watchdog, 1) == [State.MOVING]
