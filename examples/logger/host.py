"""A host that logs through an isolated contract: enums, text, and one logger for all callers."""

from enum import IntEnum
from pathlib import Path

from luacell.client import LuaHostBridge


class LogLevel(IntEnum):  # a proxy takes plain numbers for enums, too
    DEBUG, INFO, WARN, ERROR = range(4)


def main() -> None:
    with LuaHostBridge() as bridge:
        bridge.deploy(Path(__file__).parent)
        logger = bridge.contract("host.logger", "1.0")
        logger.log("started")
        logger.log_with_level(LogLevel.WARN, "disk almost full")
        logger.log_with_level(LogLevel.DEBUG, "nobody asked for this")
        logger.set_threshold(LogLevel.DEBUG)
        bridge.contract("host.logger").log_with_level(LogLevel.DEBUG, "somebody did")  # another proxy, the same logger
        for line in logger.lines():
            print(line)


if __name__ == "__main__":
    main()
