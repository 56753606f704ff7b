"""Weight files by hand: safetensors read and written, shards and PyTorch's older pickle files read.

You learn here: what is inside the files that models come in; what a memory map is, and why opening gigabytes takes
milliseconds; how to read a file from a stranger, every number of which may be a lie.

    python 06_finetune/weights.py data/minilm/model.safetensors    list it: a file, or a folder that holds one
    python 06_finetune/weights.py pytorch_model.bin --out DIR      and write DIR/model.safetensors

You should see (MiniLM): one line per tensor, then "104 tensors, 22,713,728 parameters, 90,856,960 bytes". No weight
is read for that. Writes: nothing, or with --out model.safetensors.
Left out on purpose: numbers of four and six bits; shards of pytorch_model.bin; big-endian machines. A program that
shortens a file while it is mapped kills this one, as with every memory map.
"""

import contextlib
import json
import mmap
import os
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils

## A safetensors file (https://github.com/huggingface/safetensors, section Format) has three parts:
##     8 bytes    N, the length of the header, an unsigned little-endian integer
##     N bytes    the header, JSON, padded with spaces:
##                {"__metadata__": {"format": "pt"},
##                 "wpe.weight": {"dtype": "F32", "shape": [1024, 768], "data_offsets": [0, 3145728]}, ...}
##     the rest   the data: one tensor after the other, row by row; data_offsets (begin, end) count from its start
## It holds no code, as a pickle does, and nothing that grows when unpacked, as a zip does. A reader that believes no
## number before it has checked it can open a file from anybody.

# In the order in which the reference ranks them: the last are written first, so that every tensor is aligned.
DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
          "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
          "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
          "C64": torch.complex64, "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64}
SUB_BYTE = ("F4", "F6_E2M3", "F6_E3M2")  # the format has these too
MAX_HEADER = 100_000_000  # bytes, the format's limit
MAX_ENTRY = 100_000  # bytes of JSON about one tensor, our own limit: 64 dimensions of 20 digits take 1,344
MAX_INDEX = 50_000_000  # bytes of an index of shards, our own limit: half a million names of 100 bytes each

# Enough of JSON's grammar to walk an object member by member. The possessive `*+` gives nothing back once matched, so
# that time grows with the length alone, and no memory is needed.
SPACE = r"[ \t\r\n]*+"
STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
OBJECT = r'\{[^{}"]*+(?:' + STRING + r'[^{}"]*+)*+\}'  # with no further object in it
END, EMPTY = re.compile(SPACE.encode()), re.compile(rf"\{{{SPACE}\}}{SPACE}".encode())
STRINGS, OBJECTS = (re.compile(rf"{SPACE}({STRING}){SPACE}:{SPACE}({value}){SPACE}([,}}])".encode(), re.DOTALL)
                    for value in (STRING, OBJECT))


class Fault(Exception):
    """What is wrong with a file, in words that go on after `PATH is refused: `."""


class Entry(NamedTuple):
    """Where a tensor lies. Nothing is read before tensor() is called."""

    dtype: torch.dtype
    shape: list[int]
    begin: int  # bytes from the start of the file
    size: int  # bytes
    file: mmap.mmap

    def tensor(self) -> Tensor:
        """A view of the memory map; a tensor that does not lie at a multiple of its number's size is copied."""
        if self.size == 0:
            return torch.empty(self.shape, dtype=self.dtype)  # frombuffer makes none of these
        data = torch.frombuffer(self.file, dtype=torch.uint8, count=self.size, offset=self.begin)
        ## The format does not promise alignment, and PyTorch's loops take it for granted. As bytes the data can be
        ## moved to where they are aligned, and be seen as numbers there.
        if self.begin % self.dtype.itemsize:
            data = data.clone()
        return data.view(self.dtype).view(self.shape)


class Weights(Mapping):
    """Name -> Tensor, each made when it is asked for. `metadata` is the file's own, str -> str.

    ## A memory map makes a file appear in memory without reading it: the system fetches a page (4 KiB) when one of its
    ## bytes is first touched, and may drop it when memory is short. Programs that map the same file share its pages.
    ## The maps here are private (ACCESS_COPY): whoever writes into a tensor gets a copy of that page, and the file
    ## stays as it is.
    """

    def __init__(self, entries: Mapping[str, Entry | Tensor], metadata: dict[str, str]):
        self.entries, self.metadata = entries, metadata

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        return entry.tensor() if isinstance(entry, Entry) else entry

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def open_weights(path: Path | str) -> Weights:
    """Open a .safetensors file, an index of shards (.json), a pytorch_model.bin (.bin, .pt, .pth), or a folder of one.

    The tensors are on the CPU. Raises utils.InputError, one sentence, for a file that is missing, can't be read or
    breaks a rule of its format. No code that a file may carry is run.
    """
    path = Path(path)
    with _refusals(path):
        if path.is_dir():
            known = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
            names = [name for name in known if (path / name).is_file()]
            if not names:
                raise utils.InputError(f"{path} holds none of {', '.join(known)}; name a file or another folder.")
            return open_weights(path / names[0])
        if not path.is_file():
            raise utils.InputError(f"{path} is not there, or is no file; check the path, or download it first.")
        if path.suffix in (".bin", ".pt", ".pth"):
            return _open_pickle(path)
        return _open_shards(path) if path.suffix == ".json" else _open_safetensors(path)


@contextlib.contextmanager
def _refusals(path: Path) -> Iterator[None]:
    try:
        yield
    except Fault as fault:
        raise utils.InputError(f"{path} is refused: {fault}; download it again, or have it written anew.") from None
    except OSError as error:
        reason = error.strerror or error
        raise utils.InputError(f"{path} cannot be read ({reason}); check the path and its permissions.") from error


# ---------------------------------------------------------------------------------------------- reading safetensors
def _open_safetensors(path: Path) -> Weights:
    with open(path, "rb") as stream:
        length = os.fstat(stream.fileno()).st_size
        if length < 8:
            raise Fault(f"it has {length} bytes, and the header's length alone takes 8")
        file = mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_COPY)
    (n,) = struct.unpack_from("<Q", file)
    if file[:20] == b"version https://git-":
        raise Fault("it is not the weights but a pointer to them, which `git lfs pull` follows")
    if n > MAX_HEADER:
        raise Fault(f"it claims a header of {n:,} bytes, more than the {MAX_HEADER:,} that are allowed")
    start = 8 + n  # of the data
    if start > length:
        raise Fault(f"it claims a header of {n:,} bytes, but has only {length - 8:,} more: it was cut short")
    entries, strings, claimed = {}, [], 0
    for name, begin, end in _members(file, 8, start, OBJECTS, "the header"):
        if name == "__metadata__":
            strings = _members(file, begin, end, STRINGS, name)  # a generator: walked below
            continue
        entries[name] = entry = _entry(file, f"tensor {_short(name)}", begin, end, start)
        ## A header of a few megabytes can give the same bytes to 100,000 tensors, and whoever copies each of them runs
        ## out of memory (attack 3 on the reference's list). Counting along ends such a file after a few entries.
        claimed += entry.size
        if claimed > length - start:
            raise Fault(f"its tensors overlap: up to {_short(name)} they claim {claimed:,} bytes of {length - start:,}")
    at, before = start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].size)):
        if entry.begin != at:
            how = "overlaps with" if entry.begin < at else f"leaves a hole of {entry.begin - at:,} bytes after"
            raise Fault(f"tensor {_short(name)} {how} {before}")
        at, before = at + entry.size, _short(name)
    if at < length:  # room for a second file in this one, say a program
        raise Fault(f"its last {length - at:,} bytes belong to no tensor")
    return Weights(entries, {name: _json(file[begin:end], "__metadata__") for name, begin, end in strings})


def _members(file: mmap.mmap, begin: int, end: int, kind: re.Pattern, what: str) -> Iterator[tuple[str, int, int]]:
    """Walk the JSON object that fills file[begin:end], its values all STRINGS or all OBJECTS, trailing space allowed.

    Yields each name, and where its value begins and ends.

    ## json.loads would build the whole header, up to 100 MB of JSON, before the first check. Walked like this, a header
    ## costs what stands before its first fault.
    """
    if file[begin : min(begin + 1, end)] != b"{":
        raise Fault(f"{what} does not begin with {{")
    at, names, more = begin + 1, set(), not EMPTY.fullmatch(file, begin, end)
    while more:
        member = kind.match(file, at, end)
        if not member:
            raise Fault(f"{what} is not a JSON object of {'strings' if kind is STRINGS else 'flat objects'}: see its "
                        f"byte {at - begin:,}, {_short(file[at : min(at + 40, end)])}")
        name = _json(member[1], f"a name in {what}")
        if name in names:
            raise Fault(f"{what} has {_short(name)} twice")
        names.add(name)
        yield name, *member.span(2)
        at, more = member.end(), member[3] == b","
    if names and not END.fullmatch(file, at, end):
        raise Fault(f"{what} goes on after its closing bracket")


def _entry(file: mmap.mmap, what: str, begin: int, end: int, start: int) -> Entry:
    """Check what can be checked about one tensor alone. Its JSON is file[begin:end]; the data begin at start."""
    if end - begin > MAX_ENTRY:
        raise Fault(f"{what} has an entry of {end - begin:,} bytes, longer than any shape needs")
    entry, fields = _json(file[begin:end], what), ("dtype", "shape", "data_offsets")
    if not entry.keys() >= set(fields):
        raise Fault(f"{what} has not all of {', '.join(fields)}")
    dtype, shape, offsets = (entry[field] for field in fields)
    if dtype in SUB_BYTE:
        raise Fault(f"{what} has dtype {dtype}, less than a byte per number, which is not supported here")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Fault(f"{what} has the unknown dtype {_short(dtype)}")
    for field, numbers in (("shape", shape), ("data_offsets", offsets)):
        ## To Python True is an int and 2.0 equals 2, so only the exact type will do.
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise Fault(f"{what} has {field} other than a list of whole numbers from 0")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise Fault(f"{what} has data_offsets other than a begin and an end after it")
    if start + offsets[1] > len(file):
        raise Fault(f"{what} ends at byte {offsets[1]:,} of the data, which have {len(file) - start:,}: the header is "
                    "wrong, or the file was cut short")
    ## Python's integers grow without limit, PyTorch's sizes have 64 bits. Were the product to wrap around, a huge shape
    ## could pass for a small one. Strides must fit too, also where another dimension is 0: hence max(dimension, 1).
    size = DTYPES[dtype].itemsize
    for dimension in shape:
        size *= max(dimension, 1)
        if size >= 2**63:
            raise Fault(f"{what} has a shape that overflows 64 bits")
    size = 0 if 0 in shape else size
    if size != offsets[1] - offsets[0]:
        raise Fault(f"{what} has {offsets[1] - offsets[0]:,} bytes, but its shape and dtype make {size:,}")
    return Entry(DTYPES[dtype], shape, start + offsets[0], size, file)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(members := dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return members


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _integer(digits: str) -> int | float:
    # what exceeds 64 bits becomes a float, as in the reference; also, int() of a million digits is slow
    return int(digits) if len(digits) <= 20 and digits != "-0" else float(digits)


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant, parse_int=_integer)


def _json(data: bytes, what: str) -> Any:
    """json.loads, stricter: UTF-8 alone, no name twice in an object, no NaN or Infinity, no half characters."""
    try:
        value = DECODER.decode(str(data, "utf-8"))
        if isinstance(value, str):
            value.encode()  # "\ud800", half of a surrogate pair, is JSON but no character
        return value
    except UnicodeError:
        raise Fault(f"{what} is not UTF-8") from None
    except RecursionError:
        raise Fault(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise Fault(f"{what} is not valid JSON ({error})") from None


def _short(value: Any) -> str:
    """For messages and lists: a name may be as long as a book, or hold codes that steer the terminal."""
    text = ascii(value[:100]) if isinstance(value, str | bytes) else f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


# ---------------------------------------------------------------------------------------------- shards and pickles
def _open_shards(path: Path) -> Weights:
    """Large models come in several files, and an index: {"weight_map": {tensor's name: file's name}}."""
    if path.stat().st_size > MAX_INDEX:
        raise Fault(f"an index of shards has at most {MAX_INDEX:,} bytes")
    index = _json(path.read_bytes(), "the index")
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise Fault("it has no weight_map from tensors' names to files' names")
    shards: dict[str, set[str]] = {}
    for name, shard in places.items():
        shards.setdefault(shard, set()).add(name)
    entries, metadata = {}, {}
    for shard, names in shards.items():
        ## The index may come from a stranger too, and `../../secret` is none of its business.
        if not re.fullmatch(r"[\w. -]+\.safetensors", shard):
            raise Fault(f"its shard {_short(shard)} is not the name of a .safetensors file in the same folder")
        if not path.with_name(shard).is_file():
            raise utils.InputError(f"{path} names the shard {shard}, which is missing; download it to the same folder.")
        with _refusals(path.with_name(shard)):
            weights = _open_safetensors(path.with_name(shard))
        if names != weights.keys():
            raise Fault(f"it and {shard} disagree on whether tensor {_short(min(names ^ weights.keys()))} is in there")
        entries |= weights.entries
        metadata |= weights.metadata
    return Weights(entries, metadata)


def _open_pickle(path: Path) -> Weights:
    """Read {name: tensor} as torch.save writes it: mapped where it is a zip, as since PyTorch 1.6.

    ## A pickle is a program that builds objects and may call any function to do so. weights_only lets it call none but
    ## the few that build tensors.
    """
    with open(path, "rb") as file:
        mapped = zipfile.is_zipfile(file)
    try:
        if mapped:
            with zipfile.ZipFile(path) as archive:
                ## A zip of some megabytes can unpack to terabytes. torch.save stores tensors as they are.
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise Fault("it is a compressed zip, which torch.save never writes")
        with warnings.catch_warnings(action="ignore"):  # about pickles that end in an error anyway
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Fault:
        raise
    except Exception as error:  # a damaged pickle can end in nearly any
        code = "GLOBAL" in str(error)
        raise Fault("it carries code, which is never run" if code else "it is not what torch.save writes") from error
    if not isinstance(tensors, dict):
        raise Fault("it does not hold tensors by name")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise Fault(f"it has {_short(name)}, which is not a tensor with a name")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise Fault(f"its tensor {_short(name)} is sparse, or has no data")
        if tensor.nbytes > path.stat().st_size:
            raise Fault(f"its tensor {_short(name)} claims more bytes than the file has")
    return Weights({name: tensor.detach() for name, tensor in tensors.items()}, {})


# ---------------------------------------------------------------------------------------------- writing safetensors
def save_safetensors(tensors: Mapping[str, Tensor], path: Path | str, metadata: dict[str, str] | None = None) -> None:
    """Write tensors, of any device and stride, to one file: atomically, and one after the other to save memory.

    The bytes are those of the reference; with several metadata, whose order it leaves to chance, in the order given.
    Tensors that share memory, which the reference refuses, are each written in full. Raises utils.InputError for what
    the format can't hold, and where the file can't be written.
    """
    path, names = Path(path), {dtype: name for name, dtype in DTYPES.items()}
    if not all(isinstance(word, str) for pair in (metadata or {}).items() for word in pair):
        raise utils.InputError("the metadata is not all strings; use json.dumps on what is not.")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__" or not isinstance(tensor, Tensor):
            raise utils.InputError(f"{_short(name)} is not a tensor with a name of its own; rename it or leave it out.")
        if tensor.dtype not in names or tensor.layout != torch.strided or tensor.is_meta:
            raise utils.InputError(f"{_short(name)} ({tensor.dtype}, {tensor.layout}, {tensor.device}) can't be stored "
                                   "in safetensors; convert it first.")
    ## The largest numbers first: then each tensor begins at a multiple of its number's size, and can be mapped.
    rank = {dtype: i for i, dtype in enumerate(names)}
    order = sorted(tensors, key=lambda name: (-rank[tensors[name].dtype], name))
    header, end = {} if metadata is None else {"__metadata__": metadata}, 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        dtype, shape = names[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise utils.InputError("a name or the metadata holds half a surrogate pair; write it in UTF-8.") from error
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    if len(text) > MAX_HEADER:
        raise utils.InputError(f"the header would have {len(text):,} of {MAX_HEADER:,} bytes allowed; write two files.")

    def write(file) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            tensor = tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())

    utils.write_atomically(path, write)  # by a rename: who has mapped the old file keeps it


def main() -> None:
    parser = utils.parser(__doc__, __file__)
    parser.add_argument("path", type=Path, help="a .safetensors file, an index.json, a .bin, or a folder that has one")
    parser.set_defaults(out=None)  # without --out nothing is written
    args = parser.parse_args()
    weights, parameters, size = open_weights(args.path), 0, 0
    for name, tensor in weights.items():
        shown = name if name.isascii() and name.isprintable() and len(name) < 80 else _short(name)
        print(f"{shown:52} {str(tensor.dtype).removeprefix('torch.'):8} {tuple(tensor.shape)}")
        parameters, size = parameters + tensor.numel(), size + tensor.nbytes
    print(f"{len(weights):,} tensors, {parameters:,} parameters, {size:,} bytes")
    if args.out:
        save_safetensors(weights, args.out / "model.safetensors", weights.metadata or {"format": "pt"})
        print(f"wrote {args.out / 'model.safetensors'}")


if __name__ == "__main__":
    utils.run(main)
