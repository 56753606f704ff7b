"""Exercise: show any chapter's run in TensorBoard, without the tensorboard package: write its event file by hand.

    python tests/exercises/tensorboard_log.py 05_transformer/outputs/metrics.json --out runs
    pip install tensorboard && tensorboard --logdir runs                                        to look at it

You should see, for each file, how many scalars it held. Three runs of chapters 01 and 05 gave 46, 10 and 49. Read
back by the tensorboard package (2.21, EventAccumulator), all 105 were equal in step, tag and value, as 32-bit floats.
Of a file in which one bit was turned, it read nothing from that place on.
Learned: a binary format is a few rules about lengths. One checksum and four kinds of fields are enough here.
Writes: OUT/NAME/events.out.tfevents.0.metrics, one for each metrics.json. Left out on purpose: pictures, histograms.
"""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
import utils

# ---------------------------------------------------------------------------------------------- the checksum
## CRC-32C: the bytes as one long binary polynomial, its remainder after division by the Castagnoli polynomial. The
## table holds the remainder that each single byte leaves; 0x82F63B78 is the divisor with its bits in reverse order.
TABLE = []
for byte in range(256):
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    TABLE.append(byte)


def crc32c(data: bytes) -> int:
    """The checksum of RFC 3720, appendix B.4. zlib.crc32 divides by another polynomial and is of no use here."""
    crc = 0xFFFFFFFF
    for value in data:
        crc = TABLE[(crc ^ value) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """Rotated and shifted by a constant, as TFRecord wants it: the checksum of data that holds checksums is weak."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# ---------------------------------------------------------------------------------------------- protocol buffers
def varint(n: int) -> bytes:
    """A number that is not negative, 7 bits per byte, the lowest first; the 8th bit says that more follow."""
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


## A message is a list of fields; each begins with its number and how its end is found: 0 a varint, 1 eight bytes, 2 a
## length and so many bytes (text, or a message within), 5 four bytes. Names are not written; the .proto file has them:
##     Event    wall_time = 1 (double), step = 2 (int64), file_version = 3 (string), summary = 5 (Summary)
##     Summary  value = 1 (Value, any number of them)
##     Value    tag = 1 (string), simple_value = 2 (float)
def key(number: int, kind: int) -> bytes:
    return varint(number << 3 | kind)


def text(number: int, data: bytes) -> bytes:
    """A field of kind 2: text, or a message within the message."""
    return key(number, 2) + varint(len(data)) + data


def event(wall_time: float, step: int, scalars: dict[str, float]) -> bytes:
    """One Event: all the scalars of one step."""
    values = b"".join(text(1, text(1, tag.encode()) + key(2, 5) + struct.pack("<f", value))
                      for tag, value in scalars.items())
    return key(1, 1) + struct.pack("<d", wall_time) + key(2, 0) + varint(step) + text(5, values)


def record(data: bytes) -> bytes:
    """TFRecord: the length, its checksum, the data, its checksum. A reader can tell a file that was cut short."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked(crc32c(length))) + data + struct.pack("<I", masked(crc32c(data)))


# ---------------------------------------------------------------------------------------------- a run
def scalars(run: dict) -> Iterator[tuple[float, int, dict[str, float]]]:
    """(seconds, step, {tag: value}) for each row of a metrics.json's history; its final metrics at the last step.

    step and seconds become the axes. JSON knows numbers only as what Python made of them: an int is a scalar too, while
    text, lists and True are not.
    """
    number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool)  # noqa: E731
    seconds, step = 0.0, 0
    for row in run["history"]:
        seconds, step = row.get("seconds", seconds), row["step"]
        yield seconds, step, {tag: v for tag, v in row.items() if tag not in ("step", "seconds") and number(v)}
    yield seconds, step, {f"final/{tag}": v for tag, v in run["metrics"].items() if number(v)}


def convert(path: Path, out: Path) -> int:
    """Write one metrics.json as an event file into the folder out; return how many scalars. Raises utils.InputError."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        rows = list(scalars(run))
        ## metrics.json knows how long the training took, and the file's date when it ended.
        begun = path.stat().st_mtime - run["seconds"]
    except FileNotFoundError as error:
        raise utils.InputError(f"{path} does not exist; give a metrics.json that train.py wrote.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise utils.InputError(f"{path} is no metrics.json of a chapter; give one that train.py wrote.") from error
    head = key(1, 1) + struct.pack("<d", begun) + text(3, b"brain.Event:2")
    data = b"".join(record(message) for message in (head, *(event(begun + s, n, tags) for s, n, tags in rows)))
    ## TensorBoard takes every file with `tfevents` in its name. Always the same name: a second run of this script then
    ## replaces the curve instead of drawing it twice.
    utils.write_atomically(out / "events.out.tfevents.0.metrics", lambda file: file.write(data))
    return sum(len(tags) for _, _, tags in rows)


def main() -> None:
    parser = utils.parser(__doc__, __file__)
    add = parser.add_argument
    add("runs", type=Path, nargs="+", help="metrics.json files; several are drawn in one plot, for comparison")
    args = utils.parse_args(parser)
    names = {}
    for path in args.runs:
        folder = path.resolve().parent
        name = folder.parent.name if folder.name == "outputs" else folder.name
        if name in names:
            raise utils.InputError(f"{path} and {names[name]} would both be called {name}; rename a folder.")
        names[name] = path
    for name, path in names.items():
        print(f"{path}: {convert(path, args.out / name)} scalars, to {args.out / name}")


if __name__ == "__main__":
    utils.run(main)
