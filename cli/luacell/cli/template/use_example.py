"""A host of host.example: run it with `python use_example.py`."""

from pathlib import Path

from luacell.client import LuaHostBridge


def main() -> None:
    """Note two texts and print what was noted."""
    with LuaHostBridge() as bridge:
        bridge.deploy(Path(__file__).parent)
        notes = bridge.contract("host.example", "1.0")
        notes.add(0, "the disk is half full")
        notes.add(1, "the disk is full")
        for note in notes.all():
            print(note.number, note.level.name, note.text)


if __name__ == "__main__":
    main()
