"""A pipeline over a CSV file: decoder, validator, transformer and reporter, each in a process of its own."""

import sys
from pathlib import Path

from luacell.client import LuaHostBridge

HERE = Path(__file__).parent
PIECE = 64  # bytes; small, to show that a row may come in pieces


def main(path: Path) -> None:
    with LuaHostBridge() as bridge, path.open("rb") as file:
        bridge.deploy(HERE)
        decoder, validator, transformer, reporter = (
            bridge.contract(f"host.csv_{stage}") for stage in ("decoder", "validator", "transformer", "reporter")
        )
        while True:
            data = file.read(PIECE)
            for _ in range(decoder.feed(data) if data else decoder.finish()):
                row = decoder.next()
                if row.line == 1:  # the names of the columns
                    continue
                verdict = validator.check(row)
                if verdict.problem:
                    print(f"line {row.line}: {verdict.problem.name}: {verdict.text}")
                else:
                    reporter.add(transformer.transform(row))
            if not data:
                break
        for each in reporter.report():
            print(f"{each.station}: {each.count} x {each.lowest:.1f} / {each.mean:.1f} / {each.highest:.1f} C")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "readings.csv")
