"""Starts the sharding job. `ray job submit` uses ``python -m data_sharding CONFIG.yaml --output DIR``.

The import of the job takes seconds on a busy machine, so this module first imports only the code that handles stop
signals.
"""

import sys

from data_sharding.common.errors import run_main
from data_sharding.common.stop import end_command, raise_on_stop_signals


def _shard(words: list[str]) -> int:
    with raise_on_stop_signals():
        from data_sharding.job.run import parse_and_shard

        return parse_and_shard(words)


def main(argv: list[str] | None = None) -> int:
    """Run ``dreamscale shard`` and return its exit code; the command can be stopped at any moment."""
    return run_main(_shard, argv)


if __name__ == "__main__":
    sys.exit(end_command(main()))
