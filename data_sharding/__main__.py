"""Starts the sharding job. `ray job submit` uses ``python -m data_sharding CONFIG.yaml --output DIR``.

Importing the modules of the job takes seconds on a busy machine, and a stop signal can arrive during this time. So this
module first imports only the code that handles stop signals.
"""

import sys

from data_sharding.common.early_stop import end_on_stop_signals

if __name__ == "__main__":
    end_on_stop_signals()


def _shard(words: list[str]) -> int:
    # If a stop signal arrives before this import has ended, `early_stop` ends the command at once.
    from data_sharding.common.stop import raise_on_stop_signals
    from data_sharding.job.run import main as shard

    with raise_on_stop_signals():
        return shard.body(shard.parse(words))


def main(argv: list[str] | None = None) -> int:
    """Run ``dreamscale shard`` and return its exit code; the command can be stopped at any moment."""
    from data_sharding.common.errors import run_main

    return run_main(_shard, argv)


def _run() -> int:
    code = main()
    from data_sharding.common.stop import end_command

    return end_command(code)


if __name__ == "__main__":
    sys.exit(_run())
