"""Weight files by hand: safetensors read and written, shards and PyTorch's older pickle files read.

You learn here: what is inside the files that models come in; what a memory map is, and why opening gigabytes takes
milliseconds; how to read a file from a stranger, every number of which may be a lie.

    python 06_finetune/weights.py data/minilm/model.safetensors    list it: a file, or a folder that holds one
    python 06_finetune/weights.py pytorch_model.bin --out DIR      and write DIR/model.safetensors

You should see (MiniLM): one line per tensor, then "104 tensors, 22,713,728 parameters, 90,856,960 bytes". No weight
is read for that. Writes: nothing, or with --out model.safetensors.
Left out on purpose: numbers of six bits, which PyTorch does not have; shards of pytorch_model.bin; big-endian machines.
A program that shortens a file while it is mapped kills this one, as with every memory map.
"""

import json
import mmap
import os
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
DTYPES = {"BOOL": torch.bool, "F4": torch.float4_e2m1fn_x2, "U8": torch.uint8, "I8": torch.int8,
          "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
          "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "I16": torch.int16,
          "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32,
          "F32": torch.float32, "C64": torch.complex64, "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64}
MAX_HEADER, MAX_CONFIG = 100_000_000, 10_000_000  # bytes: the format's limit, and ours for a folder's settings
KNOWN = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")  # in a folder


class Fault(Exception):
    """What is wrong with a file, in words that go on after `PATH is refused: `."""


def must(right: Any, fault: str) -> None:
    if not right:
        raise Fault(fault)


def open_weights(path: Path | str) -> dict[str, Tensor]:
    """Open a .safetensors file, an index of shards (.json), a pytorch_model.bin (.bin, .pt, .pth), or a folder of one.

    The tensors are on the CPU. Raises utils.InputError, one sentence, for a file that is missing, can't be read or
    breaks a rule of its format. No code that a file may carry is run.

    ## A memory map makes a file appear in memory without reading it: the system fetches a page (4 KiB) when one of its
    ## bytes is first touched, and may drop it when memory is short. Programs that map the same file share its pages.
    ## The maps here are private (ACCESS_COPY): whoever writes into a tensor gets a copy of that page, and the file
    ## stays as it is.
    """
    path, pickles = Path(path), dict.fromkeys((".bin", ".pt", ".pth"), _open_pickle)
    try:
        if path.is_dir():
            names = [name for name in KNOWN if (path / name).is_file()]
            if not names:
                raise utils.InputError(f"{path} holds none of {', '.join(KNOWN)}; name a file or another folder.")
            return open_weights(path / names[0])
        if not path.is_file():
            raise utils.InputError(f"{path} is not there, or is no file; check the path, or download it first.")
        return {**pickles, ".json": _open_shards}.get(path.suffix, _open_safetensors)(path)
    except Fault as fault:
        raise utils.InputError(f"{path} is refused: {fault}; download it again, or have it written anew.") from None
    except OSError as error:
        reason = error.strerror or error
        raise utils.InputError(f"{path} cannot be read ({reason}); check the path and its permissions.") from error


# ---------------------------------------------------------------------------------------------- reading safetensors
def _open_safetensors(path: Path) -> dict[str, Tensor]:
    with open(path, "rb") as stream:
        length = os.fstat(stream.fileno()).st_size
        must(length >= 8, f"it has {length} bytes, and the header's length alone takes 8")
        file = mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_COPY)
    (n,) = struct.unpack_from("<Q", file)
    start = 8 + n  # of the data
    must(file[:20] != b"version https://git-", "it is only a pointer to the weights, which `git lfs pull` follows")
    must(n <= MAX_HEADER, f"it claims a header of {n:,} bytes, more than the {MAX_HEADER:,} that are allowed")
    must(start <= length, f"it claims a header of {n:,} bytes, but has only {length - 8:,} more: it was cut short")
    header = _json(file[8:start], "the header")
    must(file[8:9] == b"{", "the header does not begin with {")
    metadata = header.pop("__metadata__", {})
    must(isinstance(metadata, dict) and all(isinstance(word, str) for word in metadata.values()),
         "__metadata__ is not an object of strings")
    places = {name: _place(entry, f"tensor {_short(name)}", length - start) for name, entry in header.items()}
    ## A header of a few megabytes can give the same bytes to 100,000 tensors, and whoever copies each of them runs out
    ## of memory (attack 3 on the reference's list). So each tensor has to begin where the one before it ends.
    at, before, tensors = 0, "the header", {}
    for name, (_, _, begin, end) in sorted(places.items(), key=lambda item: item[1][2:]):
        must(begin == at, f"tensor {_short(name)} overlaps with {before}, or leaves a hole after it")
        at, before = end, _short(name)
    must(at == length - start, f"its last {length - start - at:,} bytes belong to no tensor")  # but to what?
    for name, (dtype, shape, begin, end) in places.items():
        if begin == end:
            tensors[name] = torch.empty(shape, dtype=dtype)  # frombuffer makes none of these
            continue
        data = torch.frombuffer(file, dtype=torch.uint8, count=end - begin, offset=start + begin)  # a view of the map
        ## The format does not promise alignment, and PyTorch's loops take it for granted. As bytes the data can be
        ## copied to where they are aligned, and be seen as numbers there.
        if (start + begin) % dtype.itemsize:
            data = data.clone()
        tensors[name] = data.view(dtype).view(shape)
    return tensors


def _place(entry: Any, what: str, available: int) -> tuple[torch.dtype, list[int], int, int]:
    """Check what can be checked about one tensor alone: dtype, shape, begin and end in `available` bytes of data."""
    fields = ("dtype", "shape", "data_offsets")
    must(isinstance(entry, dict) and entry.keys() >= set(fields), f"{what} has not all of {', '.join(fields)}")
    dtype, shape, offsets = (entry[field] for field in fields)
    must(isinstance(dtype, str) and dtype in DTYPES, f"{what} has dtype {_short(dtype)}, which "
         f"{'PyTorch does not have' if dtype in ('F6_E2M3', 'F6_E3M2') else 'is not known here'}")
    for field, numbers in (("shape", shape), ("data_offsets", offsets)):
        ## To Python True is an int and 2.0 equals 2, so only the exact type will do.
        must(isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers),
             f"{what} has {field} other than a list of whole numbers from 0")
    must(len(offsets) == 2 and offsets == sorted(offsets), f"{what} has data_offsets other than a begin and an end")
    if dtype == "F4":  # numbers of four bits: two of them are one element to PyTorch
        must(shape and shape[-1] % 2 == 0, f"{what} has a shape whose last number is odd, and F4 comes in pairs")
        shape = [*shape[:-1], shape[-1] // 2]
    begin, end = offsets
    must(end <= available, f"{what} ends at byte {end:,} of the data, which have {available:,}: the header is wrong, "
         "or the file was cut short")
    ## Python's integers grow without limit, PyTorch's sizes have 64 bits. Were the product to wrap around, a huge shape
    ## could pass for a small one. Strides must fit too, also where another dimension is 0: hence max(dimension, 1).
    size = DTYPES[dtype].itemsize
    for dimension in shape:
        size *= max(dimension, 1)
        must(size < 2**63, f"{what} has a shape that overflows 64 bits")
    size = 0 if 0 in shape else size
    must(size == end - begin, f"{what} has {end - begin:,} bytes, but its shape and dtype make {size:,}")
    return DTYPES[dtype], shape, begin, end


def _json(data: bytes, what: str) -> Any:
    """json.loads, stricter: UTF-8 alone, no name twice in an object, no NaN or Infinity, no half characters."""
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(members := dict(pairs)) < len(pairs):
            raise ValueError("a name stands twice in one object")
        return members

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique)
        # refuses Infinity and NaN, and "\ud800", half of a surrogate pair, which is JSON but no character
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:  # a UnicodeError is a ValueError
        raise Fault(f"{what} is not valid JSON in UTF-8 ({error})") from None


def read_json(path: Path) -> Any:
    """A folder's settings. Raises OSError, ValueError, also for more than 10 MB, and RecursionError."""
    with open(path, "rb") as file:
        data = file.read(MAX_CONFIG + 1)
    if len(data) > MAX_CONFIG:
        raise ValueError(f"more than {MAX_CONFIG:,} bytes")
    return json.loads(data)


def is_float(tensor: Tensor) -> bool:
    """Whether it holds numbers that .float() takes: not those of four bits, of which two are one element."""
    return tensor.is_floating_point() and tensor.dtype != DTYPES["F4"]


def bare_names(tensors: Mapping[str, Tensor], prefix: str, path: Path) -> dict[str, str]:
    """Bare name -> name in the file at path: without prefix, and without what torch.compile puts before a name.

    Raises utils.InputError where two names become one.
    """
    bare = {name.replace("_orig_mod.", "").removeprefix(prefix): name for name in tensors}
    if len(bare) < len(tensors):
        twice = next(name for short, other in bare.items() for name in tensors
                     if name != other and name.replace("_orig_mod.", "").removeprefix(prefix) == short)
        raise utils.InputError(f"{path} is refused: {_short(twice)} is in it twice, with and without a prefix; have it "
                               "written anew.")
    return bare


def _short(value: Any) -> str:
    """For messages and lists: a name may be as long as a book, or hold codes that steer the terminal."""
    text = ascii(value[:100]) if isinstance(value, str) else f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


# ---------------------------------------------------------------------------------------------- shards and pickles
def _open_shards(path: Path) -> dict[str, Tensor]:
    """Large models come in several files, and an index: {"weight_map": {tensor's name: file's name}}."""
    index = _json(path.read_bytes(), "the index")
    places = index.get("weight_map") if isinstance(index, dict) else None
    must(isinstance(places, dict) and all(isinstance(shard, str) for shard in places.values()),
         "it has no weight_map from tensors' names to files' names")
    tensors = {}
    for shard in dict.fromkeys(places.values()):
        ## The index may come from a stranger too, and `../../secret` is none of its business.
        must(re.fullmatch(r"[\w. -]+\.safetensors", shard),
             f"its shard {_short(shard)} is not the name of a .safetensors file in the same folder")
        held = open_weights(path.with_name(shard))
        wrong = held.keys() ^ {name for name, place in places.items() if place == shard}
        must(not wrong, f"it and {shard} disagree on whether tensor {_short(min(wrong, default=''))} is in there")
        tensors |= held
    return tensors


def _open_pickle(path: Path) -> dict[str, Tensor]:
    """Read {name: tensor} as torch.save writes it: mapped where it is a zip, as since PyTorch 1.6.

    ## A pickle is a program that builds objects and may call any function to do so. weights_only lets it call none but
    ## the few that build tensors.
    """
    mapped = zipfile.is_zipfile(path)
    try:
        if mapped:
            with zipfile.ZipFile(path) as archive:
                ## A zip of some megabytes can unpack to terabytes. torch.save stores tensors as they are.
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise zipfile.BadZipFile("compressed")
        with warnings.catch_warnings(action="ignore"):  # about pickles that end in an error anyway
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except PermissionError:
        raise
    except Exception as error:  # a damaged pickle can end in nearly any
        code = "GLOBAL" in str(error)
        raise Fault("it carries code, which is never run" if code else "it is not what torch.save writes") from error
    must(isinstance(tensors, dict), "it does not hold tensors by name")
    for name, tensor in tensors.items():
        must(isinstance(name, str) and isinstance(tensor, Tensor),
             f"it has {_short(name)}, which is not a tensor with a name")
        must(tensor.layout == torch.strided and not tensor.is_meta and tensor.nbytes <= path.stat().st_size,
             f"its tensor {_short(name)} is sparse, has no data, or claims more bytes than the file has")
    return {name: tensor.detach() for name, tensor in tensors.items()}


# ---------------------------------------------------------------------------------------------- writing safetensors
def save_safetensors(tensors: Mapping[str, Tensor], path: Path | str, metadata: dict[str, str] | None = None) -> None:
    """Write tensors, of any device and stride, to one file: atomically, and one after the other to save memory.

    The bytes are those of the reference; with several metadata, whose order it leaves to chance, in the order given.
    Tensors that share memory, which the reference refuses, are each written in full. Raises utils.InputError for what
    the format can't hold, and where the file can't be written.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, tensor in tensors.items():
        pair = tensor.dtype == DTYPES["F4"] and not tensor.dim()  # two numbers, where no dimension can say so
        if (name == "__metadata__" or tensor.dtype not in names or tensor.layout != torch.strided or tensor.is_meta
                or pair):
            raise utils.InputError(f"{_short(name)} ({tensor.dtype}, {tensor.layout}, {tensor.device}) can't be stored "
                                   "in safetensors; convert it, or give it another name.")
    ## The largest numbers first: then each tensor begins at a multiple of its number's size, and can be mapped.
    rank = list(names).index
    order = sorted(tensors, key=lambda name: (-rank(tensors[name].dtype), name))
    header, end = {} if metadata is None else {"__metadata__": metadata}, 0
    for name in order:
        begin, end, dtype = end, end + tensors[name].nbytes, names[tensors[name].dtype]
        shape = list(tensors[name].shape)
        if dtype == "F4":
            shape[-1] *= 2
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8

    def write(file) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            tensor = tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())

    utils.write_atomically(Path(path), write)  # by a rename: who has mapped the old file keeps it


def main() -> None:
    parser = utils.parser(__doc__, __file__)
    parser.add_argument("path", type=Path, help="a .safetensors file, an index.json, a .bin, or a folder that has one")
    parser.set_defaults(out=None)  # without --out nothing is written
    args = parser.parse_args()
    tensors = open_weights(args.path)
    for name, tensor in tensors.items():
        shown = name if name.isascii() and name.isprintable() and len(name) < 80 else _short(name)
        print(f"{shown:52} {str(tensor.dtype).removeprefix('torch.'):8} {tuple(tensor.shape)}")
    print(f"{len(tensors):,} tensors, {sum(tensor.numel() for tensor in tensors.values()):,} parameters, "
          f"{sum(tensor.nbytes for tensor in tensors.values()):,} bytes")
    if args.out:
        save_safetensors(tensors, args.out / "model.safetensors", {"format": "pt"})
        print(f"wrote {args.out / 'model.safetensors'}")


if __name__ == "__main__":
    utils.run(main)
