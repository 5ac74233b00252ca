from __future__ import annotations

import asyncio
from itertools import islice
from typing import Any

import pytest
from redis import exceptions

from embedstream.producer import replies
from embedstream.shared.connections import (
    READER_TIMEOUT_S,
    Script,
    after_failure,
    backoff_s,
    connect,
    connect_reader,
    connect_sync,
    create_group,
    is_missing_group,
    is_out_of_memory,
    is_transient,
    pause,
)
from embedstream.shared.keys import GROUP, Keys
from embedstream.shared.lanes import Lane


def _within_script(reply: str) -> str:
    """How Redis 6.2 tells the error of a command that failed in a script."""
    return f"Error running script (call to f_0a1b): @user_script:17: @user_script: 17: -{reply}"


def _within_pipeline(reply: str) -> str:
    """How redis-py tells the error of a command that failed in a pipeline."""
    return f"Command # 2 (XADD stream * p x) of pipeline caused error: {(reply,)}"


@pytest.mark.parametrize(
    "error",
    [
        exceptions.ConnectionError("reset"),
        exceptions.BusyLoadingError("LOADING"),
        exceptions.TimeoutError("slow"),
        exceptions.ReadOnlyError("replica"),
        exceptions.OutOfMemoryError("full"),
        exceptions.MasterDownError("MASTERDOWN"),
        exceptions.ClusterDownError("CLUSTERDOWN"),
        exceptions.TryAgainError("TRYAGAIN"),
        exceptions.ResponseError("UNBLOCKED force unblock from blocking operation"),
        exceptions.ResponseError("NOREPLICAS Not enough good replicas to write"),
        exceptions.ResponseError("MISCONF Errors writing to the AOF file"),
        exceptions.ResponseError("BUSY Redis is busy running a script."),
        exceptions.ResponseError(_within_script("READONLY You can't write against a read only replica.")),
        exceptions.ResponseError(_within_pipeline("BUSY Redis is busy running a script.")),
        exceptions.ResponseError(_within_pipeline("MISCONF It can't write to the AOF file")),
        ConnectionRefusedError(),
    ],
    ids=repr,
)
def test_transient_errors_are_worth_another_try(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        exceptions.AuthenticationError("wrong password"),
        exceptions.ResponseError("WRONGTYPE Operation against a key"),
        exceptions.NoPermissionError("NOPERM"),
        exceptions.ResponseError("BUSYGROUP Consumer Group name already exists"),
        exceptions.ResponseError(_within_script("WRONGTYPE Operation against a key")),
        exceptions.ResponseError(_within_pipeline("WRONGTYPE Operation against a key")),
        ValueError("ours"),
    ],
    ids=repr,
)
def test_other_errors_are_not(error: Exception) -> None:
    assert not is_transient(error)


def test_full_memory_is_recognised() -> None:
    assert is_out_of_memory(exceptions.OutOfMemoryError("command not allowed"))
    assert is_out_of_memory(exceptions.ResponseError(_within_script("OOM command not allowed when used memory")))
    assert not is_out_of_memory(exceptions.ConnectionError("OOM"))


def test_a_missing_group_is_recognised() -> None:
    assert is_missing_group(exceptions.ResponseError("NOGROUP No such key 'a' or consumer group"))
    assert is_missing_group(exceptions.ResponseError("UNBLOCKED the stream key no longer exists"))
    assert not is_missing_group(exceptions.ConnectionError("NOGROUP"))


def test_pauses_grow_and_stay_within_a_quarter() -> None:
    pauses = list(islice(backoff_s(0.05, 1.0), 12))
    for number, seconds in enumerate(pauses):
        assert 0.75 <= seconds / min(1.0, 0.05 * 2**number) <= 1.25


async def test_a_pause_ends_when_woken() -> None:
    wake = asyncio.Event()
    asyncio.get_running_loop().call_soon(wake.set)
    async with asyncio.timeout(20):
        await pause(1000, wake)
        await pause(0.001, asyncio.Event())


@pytest.mark.integration
async def test_clients_never_retry_by_themselves(redis_url: str) -> None:
    clients: list[Any] = [connect(redis_url), connect_reader(redis_url)]
    for client in clients:
        connection = await client.connection_pool.get_connection()
        assert connection.retry._retries == 0
        await client.connection_pool.release(connection)
        await client.aclose()
    blocking = connect_sync(redis_url)
    assert blocking.connection_pool.get_connection().retry._retries == 0
    blocking.close()


@pytest.mark.integration
async def test_a_blocking_read_ends_before_its_timeout(redis_url: str, prefix: str) -> None:
    client = connect_reader(redis_url)
    assert client.connection_pool.connection_kwargs["socket_timeout"] == READER_TIMEOUT_S
    assert not await client.xread({f"{prefix}:nothing": "$"}, block=1000)
    await client.aclose()


@pytest.mark.integration
async def test_a_script_survives_its_loss(redis_url: str, keys: Keys) -> None:
    client = connect(redis_url)
    script: Script = replies._SCRIPT
    for _ in range(2):
        await client.script_flush()
        assert (await script.run(client, [keys.reply("me")], [1000]))[0] in {0, 1}
    blocking: Any = connect_sync(redis_url)
    await client.script_flush()
    assert script.run_sync(blocking, [keys.reply("me")], [1000])[0] == 0
    blocking.close()
    await client.aclose()


@pytest.mark.integration
async def test_a_group_is_created_once(redis_url: str, keys: Keys) -> None:
    client = connect(redis_url)
    lane = keys.lane(Lane.BULK)
    await create_group(client, lane, GROUP)
    await create_group(client, lane, GROUP)
    await client.set(f"{keys.base}:string", 1)
    with pytest.raises(exceptions.ResponseError, match="WRONGTYPE"):
        await create_group(client, f"{keys.base}:string", GROUP)
    await client.aclose()


@pytest.mark.integration
async def test_connections_to_an_old_primary_are_dropped(redis_url: str) -> None:
    client = connect(redis_url)
    first = await client.client_id()
    await after_failure(client, exceptions.ConnectionError("reset"))
    assert await client.client_id() == first
    for error in (
        exceptions.ReadOnlyError("replica"),
        exceptions.TimeoutError("silent"),
        exceptions.ResponseError(_within_script("READONLY You can't write against a read only replica.")),
    ):
        first = await client.client_id()
        await after_failure(client, error)
        assert await client.client_id() != first
    await client.aclose()
