"""Two hosts that share a key-value store: a singleton contract keeps one state for all."""

from pathlib import Path

from luacell.client import LuaHostBridge


def main() -> None:
    with LuaHostBridge() as bridge:
        bridge.deploy(Path(__file__).parent)
        writer, reader = bridge.contract("host.kv"), bridge.contract("host.kv")
        writer.put("colour", b"green")
        writer.put("shape", bytes(range(4)))
        print(f"colour is now at revision {writer.put('colour', b'blue')}")
        entry = reader.get("colour")
        print(f"colour = {entry.value.decode()} (revision {entry.revision})")
        print(f"keys: {', '.join(reader.keys())}")
        print(f"removed: {writer.remove('shape')}, again: {writer.remove('shape')}")
        print(f"shape is {'there' if reader.get('shape').found else 'gone'}")


if __name__ == "__main__":
    main()
