"""A host whose contract calls another one, and catches what goes wrong there."""

from pathlib import Path

from luacell.client import LuaHostBridge


def main() -> None:
    with LuaHostBridge() as bridge:
        bridge.deploy(Path(__file__).parent)
        bridge.contract("host.stock").add("lamp", 5)
        orders = bridge.contract("host.orders")
        for count in (2, 3, 1):
            print(orders.order("lamp", count))


if __name__ == "__main__":
    main()
