"""weights.py of chapter 06 against the safetensors package: what it writes, what it reads, and what it refuses."""

import filecmp
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict

import pytest
import safetensors
import safetensors.torch
import torch
from conftest import REAL, ROOT, chapter

import utils

weights = chapter("06_finetune", "weights")
SCRIPT = ROOT / "06_finetune" / "weights.py"


def random_tensor(dtype, *shape):
    """Random bytes seen as dtype: NaNs with payloads, infinities and denormals too."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    data = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return data.view(dtype)[..., 0].clone()


def same_bits(a, b):
    def bits(t):
        return t.contiguous().reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(same_bits(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def tensors():
    """Every dtype in four shapes: 0-d (but for F4, which comes in pairs), empty, odd, plain."""
    torch.manual_seed(0)
    shapes = {"scalar": (), "empty": (3, 0, 2), "odd": (3, 5), "plain": (4, 2, 8)}
    return {f"{kind}.{name}": random_tensor(dtype, *shape)
            for name, dtype in weights.DTYPES.items() for kind, shape in shapes.items() if shape or name != "F4"}


# ---------------------------------------------------------------------------------------------- both directions
def test_every_dtype_that_the_package_writes(tmp_path, tensors):
    path = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    ours = weights.open_weights(path)
    assert same(ours, tensors)
    assert {re.search('"dtype":"(.*?)"', line)[1] for line in path.read_bytes().decode("latin-1").split("{")
            if '"dtype"' in line} == set(weights.DTYPES)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {'"\\/\n\x1f\x7f\t': "ä €\u2028\U0001f600\x00"}])
def test_what_we_write_is_byte_for_byte_what_the_package_writes(tmp_path, tensors, metadata):
    names = ["z", "Z", "ä", "\U0001f600", "\uffff", 'quote"', "back\\slash", "\n\x01", ""]
    tensors |= {name: torch.ones(3) for name in names}
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", metadata)
    weights.save_safetensors(tensors, tmp_path / "ours.safetensors", metadata)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert same(safetensors.torch.load_file(tmp_path / "ours.safetensors"), tensors)
    assert same(weights.open_weights(tmp_path / "ours.safetensors"), tensors)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.safetensors", "theirs.safetensors"]


def test_no_tensors_at_all(tmp_path):
    path = tmp_path / "none.safetensors"
    weights.save_safetensors({}, path)
    assert path.read_bytes() == safetensors.torch.save({}) and len(weights.open_weights(path)) == 0


def test_several_metadata_and_odd_strides(tmp_path):
    """The package refuses what is not contiguous or shares memory; here it is written in full."""
    path, base = tmp_path / "new" / "a.safetensors", torch.arange(24.0).view(4, 6)
    odd = {"t": base.T, "step": base[:, ::2], "row": base[1], "expand": torch.ones(1, 3).expand(5, 3), "base": base,
           "conj": torch.complex(base, base).conj(), "imag": torch.complex(base, base).conj().imag,
           "grad": torch.nn.Parameter(base)}
    metadata = {"b": "2", "a": "1", "c": "3"}
    weights.save_safetensors(odd, path, metadata)
    theirs = safetensors.torch.load_file(path)
    assert theirs.keys() == odd.keys() and all(torch.equal(theirs[name], odd[name]) for name in odd)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == metadata


def test_all_tensors_are_aligned_and_mapped(tmp_path, tensors):
    weights.save_safetensors(tensors, tmp_path / "a.safetensors")
    opened = weights.open_weights(tmp_path / "a.safetensors")
    for name, tensor in opened.items():
        assert tensor.data_ptr() % tensor.dtype.itemsize == 0
        assert tensor.numel() == 0 or tensor.data_ptr() == opened[name].data_ptr()  # a view each time, no copy
        assert tensor.is_contiguous()


@pytest.mark.real("minilm/model.safetensors")
def test_minilm(tmp_path, monkeypatch, capsys):
    path = REAL / "minilm" / "model.safetensors"
    ours, theirs = weights.open_weights(path.parent), safetensors.torch.load_file(path)
    assert len(ours) == 104 and same(ours, theirs)
    monkeypatch.setattr(sys, "argv", ["weights.py", str(path), "--out", str(tmp_path)])
    weights.main()
    assert filecmp.cmp(path, tmp_path / "model.safetensors", shallow=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 106 and lines[104] == "104 tensors, 22,713,728 parameters, 90,856,960 bytes"
    assert lines[104] in weights.__doc__


# ---------------------------------------------------------------------------------------------- the memory map
def file_of(header, data=b""):
    """A file with this header (bytes, or what becomes JSON) and this data."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def test_a_write_stays_in_this_process(tmp_path):
    path = tmp_path / "a.safetensors"
    weights.save_safetensors({"a": torch.zeros(5000), "b": torch.ones(2)}, path)
    before, opened = path.read_bytes(), weights.open_weights(path)
    opened["a"].fill_(7)
    assert opened["a"].sum() == 35_000 and path.read_bytes() == before
    assert weights.open_weights(path)["a"].sum() == 0


def test_a_file_can_be_saved_over_itself(tmp_path):
    path = tmp_path / "a.safetensors"
    weights.save_safetensors({"a": torch.arange(5000.0)}, path)
    opened = weights.open_weights(path)
    weights.save_safetensors({"a": opened["a"] * 2}, path)
    assert torch.equal(opened["a"], torch.arange(5000.0))  # the old file, still mapped
    assert torch.equal(weights.open_weights(path)["a"], torch.arange(5000.0) * 2)


def test_tensors_outlive_the_mapping_object_and_no_warning(tmp_path, recwarn):
    weights.save_safetensors({"a": torch.arange(5000.0)}, tmp_path / "a.safetensors")
    tensor = weights.open_weights(tmp_path / "a.safetensors")["a"]
    os.unlink(tmp_path / "a.safetensors")
    assert torch.equal(tensor, torch.arange(5000.0)) and not len(recwarn)


@pytest.mark.parametrize("name, dtype", weights.DTYPES.items())
def test_unaligned_tensors_are_copied_to_where_they_are_aligned(tmp_path, name, dtype):
    torch.manual_seed(1)
    data = random_tensor(dtype, 5)
    raw, size = bytes(data.view(torch.uint8).numpy()), 5 * dtype.itemsize
    header = {"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
              "y": {"dtype": name, "shape": [10 if name == "F4" else 5], "data_offsets": [1, 1 + size]}}
    (tmp_path / "a.safetensors").write_bytes(file_of(header, b"\7" + raw))
    tensor = weights.open_weights(tmp_path / "a.safetensors")["y"]
    assert same_bits(tensor, data) and tensor.data_ptr() % dtype.itemsize == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux to count pages")
def test_opening_and_asking_reads_nothing(tmp_path):
    """A file of 2 GB, with holes, so that it takes no disk: only the touched page comes into memory."""
    size = 2 * 10**9
    path = tmp_path / "big.safetensors"
    path.write_bytes(file_of({"big": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}))
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + size)
        file.seek(-4, os.SEEK_END)
        file.write(struct.pack("<f", 2.5))

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    before = resident()
    tensor = weights.open_weights(path)["big"]
    assert tensor.shape == (size // 4,) and tensor[-1] == 2.5
    assert resident() - before < 20e6


# ---------------------------------------------------------------------------------------------- refused
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
ZEROS = b"\0" * 8


def entry(**changes):
    return {"a": {**F32, **changes}}


def pair(first, second):
    return {"a": entry(data_offsets=first)["a"], "b": entry(data_offsets=second)["a"]}


def raw(text):
    """A header whose one entry has this text where the shape and the offsets stand."""
    return b'{"a":{"dtype":"F32",%b}}' % text


# Each breaks one rule; the message has to name it. The package refuses every one of these too.
MALFORMED = {
    # the header's length
    "no bytes": (b"", "0 bytes"),
    "seven bytes": (b"\2\0\0\0\0\0\0", "7 bytes"),
    "length alone": (struct.pack("<Q", 60), "claims a header of 60 bytes, but has only 0"),
    "length beyond the file": (struct.pack("<Q", 1000) + file_of(entry(), ZEROS)[8:], "cut short"),
    "length one beyond the file": (struct.pack("<Q", 3) + b"{}", "cut short"),
    "length of 2**64-1": (struct.pack("<Q", 2**64 - 1) + b"{}" + ZEROS, "more than the 100,000,000"),
    "length of 2**63": (struct.pack("<Q", 2**63) + b"{}" + ZEROS, "more than the 100,000,000"),
    "length above the limit": (struct.pack("<Q", 100_000_001) + b"{}" + ZEROS, "more than the 100,000,000"),
    "length at the limit": (struct.pack("<Q", 100_000_000) + b"{}" + ZEROS, "cut short"),
    "length zero": (struct.pack("<Q", 0), "not valid JSON"),
    "length zero, then a header": (struct.pack("<Q", 0) + b"{}", "not valid JSON"),
    "length too small": (struct.pack("<Q", 10) + file_of(entry(), ZEROS)[8:], "not valid JSON"),
    "big-endian length": (struct.pack(">Q", 60) + file_of(entry(), ZEROS)[8:], "more than the 100,000,000"),
    "a text file": (b"version: these are no weights at all", "more than the 100,000,000"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
    # JSON
    "not UTF-8": (file_of(b"\xff"), "UTF-8"),
    "not UTF-8 in a name": (file_of(b'{"\xff":{}}'), "UTF-8"),
    "not UTF-8 in an entry": (file_of(b'{"a":{"\xff":1}}'), "UTF-8"),
    "UTF-8 of a surrogate": (file_of(b'{"\xed\xa0\x80":{}}'), "UTF-8"),
    "overlong UTF-8": (file_of(b'{"\xc0\xaf":{}}'), "UTF-8"),
    "UTF-16": (file_of("{}".encode("utf-16-le")), "not valid JSON"),
    "byte order mark": (file_of(b"\xef\xbb\xbf{}"), "not valid JSON"),
    "half a surrogate pair": (file_of(json.dumps(entry()).replace('"a"', '"\\ud800"').encode(), ZEROS), "UTF-8"),
    "one brace": (file_of(b"{"), "not valid JSON"),
    "no closing brace": (file_of(json.dumps(entry()).encode()[:-1], ZEROS), "not valid JSON"),
    "a list": (file_of(b"[]"), "does not begin with {"),
    "a string": (file_of(b'"a"'), "does not begin with {"),
    "null": (file_of(b"null"), "does not begin with {"),
    "a number": (file_of(b"1"), "does not begin with {"),
    "a comma too many": (file_of(json.dumps(entry()).encode()[:-1] + b",}", ZEROS), "not valid JSON"),
    "a comma first": (file_of(b"{," + json.dumps(entry()).encode()[1:], ZEROS), "not valid JSON"),
    "two objects": (file_of(b"{}{}"), "not valid JSON"),
    "two objects, one entry": (file_of(json.dumps(entry()).encode() + b"{}", ZEROS), "not valid JSON"),
    "padded with zeros": (file_of(json.dumps(entry()).encode() + b"\0\0", ZEROS), "not valid JSON"),
    "padded with form feeds": (file_of(b"{}\f"), "not valid JSON"),
    "single quotes": (file_of(b"{'a':{}}"), "not valid JSON"),
    "a name without quotes": (file_of(b"{a:{}}"), "not valid JSON"),
    "a comment": (file_of(b"{/**/}"), "not valid JSON"),
    "a line break in a name": (file_of(json.dumps(entry()).replace('"a"', '"a\nb"').encode(), ZEROS), "not valid JSON"),
    "an unknown escape": (file_of(json.dumps(entry()).replace('"a"', '"\\x41"').encode(), ZEROS), "not valid JSON"),
    "100,000 brackets": (file_of(b'{"a":' + b"[" * 100_000), "not valid JSON"),
    "100,000 braces": (file_of(b'{"a":' * 100_000), "not valid JSON"),
    "49,000 brackets in it": (file_of(raw(b'"shape":' + b"[" * 49_000 + b"]" * 49_000)), "recursion|has not all"),
    "NaN": (file_of(raw(b'"shape":[NaN],"data_offsets":[0,8]'), ZEROS), "not valid JSON"),
    "Infinity": (file_of(raw(b'"shape":[2],"data_offsets":[0,Infinity]'), ZEROS), "not valid JSON"),
    "a leading zero": (file_of(raw(b'"shape":[02],"data_offsets":[0,8]'), ZEROS), "not valid JSON"),
    "hexadecimal": (file_of(raw(b'"shape":[0x2],"data_offsets":[0,8]'), ZEROS), "not valid JSON"),
    # what a tensor must have
    "an entry that is a number": (file_of({"a": 1}), "has not all"),
    "an entry that is null": (file_of({"a": None}), "has not all"),
    "an entry with nothing": (file_of({"a": {}}), "has not all of dtype, shape, data_offsets"),
    "no dtype": (file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}, ZEROS), "has not all"),
    "no shape": (file_of(raw(b'"data_offsets":[0,8]'), ZEROS), "has not all"),
    "no offsets": (file_of(raw(b'"shape":[2]'), ZEROS), "has not all"),
    "a field twice": (file_of(raw(b'"shape":[2],"shape":[2],"data_offsets":[0,8]'), ZEROS), "twice"),
    "which is not known": (file_of(entry(dtype="F31"), ZEROS), "has dtype 'F31', which is not known"),
    "dtype in lower case": (file_of(entry(dtype="f32"), ZEROS), "which is not known"),
    "dtype is a list": (file_of(entry(dtype=["F32"]), ZEROS), "which is not known"),
    "dtype is nested": (file_of(entry(dtype=[[[["F32"]]]]), ZEROS), "has dtype <list>, which is not known"),
    "dtype is null": (file_of(entry(dtype=None), ZEROS), "which is not known"),
    "dtype of PyTorch": (file_of(entry(dtype="torch.float32"), ZEROS), "which is not known"),
    # shapes
    "shape is a number": (file_of(entry(shape=2), ZEROS), "shape other than a list"),
    "shape is null": (file_of(entry(shape=None), ZEROS), "shape other than a list"),
    "shape is text": (file_of(entry(shape="2"), ZEROS), "shape other than a list"),
    "shape of text": (file_of(entry(shape=["2"]), ZEROS), "shape other than a list"),
    "shape of lists": (file_of(entry(shape=[[2]]), ZEROS), "shape other than a list"),
    "negative shape": (file_of(entry(shape=[-2]), ZEROS), "shape other than a list"),
    "negative shape twice": (file_of(entry(shape=[-2, -1]), ZEROS), "shape other than a list"),
    "shape with a fraction": (file_of(entry(shape=[2.5]), ZEROS), "shape other than a list"),
    "shape as float": (file_of(entry(shape=[2.0]), ZEROS), "shape other than a list"),
    "shape with exponent": (file_of(raw(b'"shape":[2e0],"data_offsets":[0,8]'), ZEROS), "shape other than a list"),
    "shape of 1e400": (file_of(raw(b'"shape":[1e400],"data_offsets":[0,8]'), ZEROS), "not valid JSON"),
    "shape is true": (file_of(raw(b'"shape":[2,true],"data_offsets":[0,8]'), ZEROS), "shape other than a list"),
    "shape of 5,000 digits": (file_of(raw(b'"shape":[%b],"data_offsets":[0,8]' % (b"9" * 5000)), ZEROS), "not valid"),
    "shape of 2**64": (file_of(entry(shape=[2**64]), ZEROS), "overflows"),
    "shape overflows": (file_of(entry(shape=[2, 2**64 - 2]), ZEROS), "overflows"),
    "shape overflows to its size": (file_of(entry(shape=[2**32, 2**32, 2]), ZEROS), "overflows"),
    "shape overflows to zero": (file_of(entry(shape=[2**32, 2**32], data_offsets=[0, 0])), "overflows"),
    "bytes overflow to zero": (file_of(entry(shape=[2**62], data_offsets=[0, 0])), "overflows"),
    "bytes overflow": (file_of(entry(shape=[2, 2**63 - 1]), ZEROS), "overflows"),
    "shape overflows before its zero": (file_of(entry(shape=[2**62, 2**62, 0], data_offsets=[0, 0])), "overflows"),
    # offsets
    "offsets are a number": (file_of(entry(data_offsets=8), ZEROS), "data_offsets other than a list"),
    "one offset": (file_of(entry(data_offsets=[8]), ZEROS), "other than a begin and an end"),
    "three offsets": (file_of(entry(data_offsets=[0, 8, 8]), ZEROS), "other than a begin and an end"),
    "no offset": (file_of(entry(data_offsets=[]), ZEROS), "other than a begin and an end"),
    "negative begin": (file_of(entry(data_offsets=[-8, 0]), ZEROS), "data_offsets other than a list"),
    "negative end": (file_of(entry(data_offsets=[0, -8]), ZEROS), "data_offsets other than a list"),
    "offset is a float": (file_of(entry(data_offsets=[0, 8.0]), ZEROS), "data_offsets other than a list"),
    "offset is false": (file_of(entry(data_offsets=[False, 8]), ZEROS), "data_offsets other than a list"),
    "begin after end": (file_of(entry(data_offsets=[8, 0]), ZEROS), "other than a begin and an end"),
    "end beyond the file": (file_of(entry(shape=[3], data_offsets=[0, 12]), ZEROS), "ends at byte 12 .* which have 8"),
    "end of 2**64-1": (file_of(entry(data_offsets=[0, 2**64 - 1]), ZEROS), "ends at byte"),
    "end of 2**64": (file_of(entry(data_offsets=[0, 2**64]), ZEROS), "ends at byte"),
    "two bytes missing": (file_of(entry(), ZEROS[2:]), "cut short"),
    "all data missing": (file_of(entry()), "cut short"),
    "more bytes than the shape": (file_of(entry(shape=[1]), ZEROS), "has 8 bytes, but its shape and dtype make 4"),
    "fewer bytes than the shape": (file_of(entry(shape=[4]), ZEROS), "has 8 bytes, but its shape and dtype make 16"),
    "another dtype's size": (file_of(entry(dtype="F64"), ZEROS), "has 8 bytes, but its shape and dtype make 16"),
    "no bytes for a scalar": (file_of(entry(shape=[], data_offsets=[0, 0])), "has 0 bytes, .* make 4"),
    "bytes for an empty tensor": (file_of(entry(shape=[0]), ZEROS), "has 8 bytes, .* make 0"),
    "a hole at the start": (file_of(entry(data_offsets=[8, 16]), ZEROS * 2), "leaves a hole after it"),
    "a hole in the middle": (file_of(pair([0, 8], [12, 20]), ZEROS * 3), "'b' overlaps with 'a', or leaves a hole"),
    "an empty tensor in a hole": (file_of({**entry(), "b": {**F32, "shape": [0], "data_offsets": [12, 12]}}, ZEROS * 2),
                                  "or leaves a hole"),
    "bytes at the end": (file_of(entry(), ZEROS + b"MZ, a program"), "last 13 bytes belong to no tensor"),
    "bytes but no tensor": (file_of({}, ZEROS), "last 8 bytes belong to no tensor"),
    "overlap": (file_of(pair([0, 8], [4, 12]), ZEROS * 2), "'b' overlaps with 'a'"),
    "the same bytes twice": (file_of(pair([0, 8], [0, 8]), ZEROS * 2), "'b' overlaps with 'a'"),
    "more claimed than there is": (file_of(pair([0, 8], [0, 8]), ZEROS), "'b' overlaps with 'a'"),
    "ten on the same bytes": (file_of({f"weight_{i}": F32 for i in range(10)}, ZEROS), "overlap"),
    # metadata
    "metadata is text": (file_of({"__metadata__": "pt", **entry()}, ZEROS), "__metadata__"),
    "metadata is a list": (file_of({"__metadata__": ["pt"], **entry()}, ZEROS), "__metadata__"),
    "metadata has a number": (file_of({"__metadata__": {"a": 1}, **entry()}, ZEROS), "object of strings"),
    "metadata has null": (file_of({"__metadata__": {"a": None}, **entry()}, ZEROS), "object of strings"),
    "metadata has a list": (file_of({"__metadata__": {"a": []}, **entry()}, ZEROS), "object of strings"),
    "metadata has an object": (file_of({"__metadata__": {"a": {}}, **entry()}, ZEROS), "__metadata__"),
    "metadata twice": (file_of(b'{"__metadata__":{},"__metadata__":{}}'), "twice"),
    "metadata not UTF-8": (file_of(b'{"__metadata__":{"a":"\xff"}}'), "UTF-8"),
}

# What the package lets pass, or did in some version, against the format's text or because PyTorch has no such tensor.
STRICTER = {
    "space before the header": (file_of(b" {}"), "does not begin with {"),
    "a name twice": (file_of(b'{"a":%b,"a":%b}' % (2 * (json.dumps(F32).encode(),)), ZEROS), "twice"),
    "a name twice, once escaped": (file_of(b'{"e":%b,"\\u0065":%b}' % (2 * (b'{"dtype":"F32","shape":[0],'
                                   b'"data_offsets":[0,0]}',))), "twice"),
    "a name twice in the metadata": (file_of(b'{"__metadata__":{"a":"b","a":"b"}}'), "twice"),
    "metadata is null": (file_of({"__metadata__": None, **entry()}, ZEROS), "__metadata__"),
    "an entry that is a list": (file_of({"a": ["F32", [2], [0, 8]]}, ZEROS), "has not all"),
    "four bits, odd": (file_of(entry(dtype="F4", shape=[2, 3], data_offsets=[0, 3]), b"123"), "F4 comes in pairs"),
    "four bits, empty": (file_of(entry(dtype="F4", shape=[0, 3], data_offsets=[0, 0])), "F4 comes in pairs"),
    "four bits, 0-d": (file_of(entry(dtype="F4", shape=[], data_offsets=[0, 1]), b"1"), "F4 comes in pairs"),
    "six bits": (file_of(entry(dtype="F6_E2M3", shape=[4], data_offsets=[0, 3]), b"123"),
                 "dtype .F6_E2M3., which PyTorch does not have"),
    "empty, but its strides overflow": (file_of(entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0])), "overflows"),
    "empty, with 2**63": (file_of(entry(shape=[0, 2**63], data_offsets=[0, 0])), "overflows"),
}


@pytest.mark.parametrize("case", [*MALFORMED, *STRICTER])
def test_a_malformed_file_is_refused_in_one_sentence_that_names_the_fault(tmp_path, case):
    path = tmp_path / "bad.safetensors"
    data, message = {**MALFORMED, **STRICTER}[case]
    path.write_bytes(data)
    with pytest.raises(utils.InputError, match=message) as caught:
        weights.open_weights(path)
    text = str(caught.value)
    assert text.startswith(f"{path} is refused: ") and text.endswith("; download it again, or have it written anew.")
    assert len(text) < len(str(path)) + 300 and "\n" not in text and text.isascii()
    if case in MALFORMED:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.torch.load(data)


LEGAL = {
    "spaces after the header": file_of(json.dumps(entry()).encode() + b" " * 13, ZEROS),
    "any white space after the header": file_of(b"{}\r\n\t "),
    "an empty object with a space": file_of(b"{ } "),
    "white space everywhere": file_of(json.dumps(entry(), indent=3).encode(), ZEROS),
    "names in escapes": file_of(json.dumps({'"\\}{ä\n\U0001f600': F32}).encode(), ZEROS),
    "names in UTF-8": file_of(json.dumps({'"\\}{ä\n\U0001f600': F32}, ensure_ascii=False).encode(), ZEROS),
    "braces in strings": file_of({"__metadata__": {"{": "}],{"}, "}": {**F32, "comment": '}"{'}}, ZEROS),
    "fields in another order": file_of({"a": dict(reversed(F32.items()))}, ZEROS),
    "a further field": file_of(entry(comment=1.5), ZEROS),
    "a name of a field": file_of({"dtype": F32}, ZEROS),
    "an empty name": file_of({"": F32}, ZEROS),
    "later data first": file_of(pair([8, 16], [0, 8]), bytes(range(16))),
    "0-d": file_of(entry(shape=[], data_offsets=[0, 4]), b"1234"),
    "100 dimensions": file_of(entry(shape=[1] * 100, data_offsets=[0, 4]), b"1234"),
    "empty tensors between": file_of({"z": {**F32, "shape": [0, 5], "data_offsets": [8, 8]}, **pair([0, 8], [8, 16]),
                                      "y": {**F32, "shape": [0], "data_offsets": [8, 8]},
                                      "x": {**F32, "shape": [0], "data_offsets": [0, 0]}}, ZEROS * 2),
    "empty metadata": file_of({"__metadata__": {}, **entry()}, ZEROS),
    "long metadata": file_of({"__metadata__": {"a": '"\\' * 300_000}, **entry()}, ZEROS),
    "metadata last": file_of({**entry(), "__metadata__": {"a": "b"}}, ZEROS),
}


@pytest.mark.parametrize("case", LEGAL)
def test_an_odd_but_legal_file_is_read_as_the_package_reads_it(tmp_path, case):
    path = tmp_path / "odd.safetensors"
    path.write_bytes(LEGAL[case])
    ours = weights.open_weights(path)
    assert same(ours, safetensors.torch.load_file(path))


def test_damage_at_random_is_refused_or_read_as_the_package_reads_it(tmp_path):
    """A small fuzz: what the package refuses, so do we; what both read is equal; no other error ever escapes."""
    torch.manual_seed(0)
    whole = safetensors.torch.save({"a": torch.rand(3), "b": torch.zeros(2, 0), "c": torch.tensor(1)}, {"k": "v"})
    header = struct.unpack("<Q", whole[:8])[0] + 8
    files = [whole[:n] for n in range(0, len(whole), 3)]
    for at, byte in zip(torch.randint(header, (700,)).tolist(), b'\0\xff {}[],:"-019e\\_' * 40):
        files.append(whole[:at] + bytes([byte]) + whole[at + 1 :])
    path, read = tmp_path / "a.safetensors", 0
    for data in files:
        path.write_bytes(data)
        try:
            theirs = safetensors.torch.load(data)
        except safetensors.SafetensorError:
            theirs = None
        try:
            ours = weights.open_weights(path)
        except utils.InputError:
            continue
        assert theirs is not None and same(ours, theirs), data[:header]
        read += 1
    assert read > 10  # some only change a letter of a name


SWEEP = """if True:
    import resource, sys, time, tracemalloc
    sys.path[:0] = sys.argv[1:3]
    import utils, weights
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    first = peak()
    for path in sys.argv[3:]:
        tracemalloc.start()
        start = time.process_time()
        try:
            weights.open_weights(path)
            words = "ACCEPTED"
        except utils.InputError as error:
            words = str(error)
        print(time.process_time() - start, tracemalloc.get_traced_memory()[1], peak() - first, words, sep="|")
        tracemalloc.stop()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
def test_refusals_take_little_time_and_memory(tmp_path):
    """The reference's list of attacks (its folder attacks/), and headers of a megabyte.

    Seconds of the processor, so that a busy machine does not matter; the memory Python took, and what the whole process
    grew by, pages of the mapped files included.
    """
    big = 1_000_000
    overlapping = {f"weight_{i}": {"dtype": "F32", "shape": [200, 200], "data_offsets": [0, 160_000]}
                   for i in range(10_000)}
    header = json.dumps(overlapping).encode()
    files = {
        "attack 1": struct.pack("<Q", 1000) + file_of(entry(), ZEROS)[8:],
        "attack 2": struct.pack("<Q", 800_000_000) + header,
        "attack 3": file_of(header, b"\0" * len(header)),
        "negative": file_of(entry(data_offsets=[-8, 0]), ZEROS),
        "outside": file_of(entry(data_offsets=[2**40, 2**40 + 8]), ZEROS),
        "huge shape": file_of(entry(shape=[10**12], data_offsets=[0, 4 * 10**12]), ZEROS),
        "brackets": file_of(b'{"a":' + b"[" * big),
        "zeros": file_of(b'{"a":{"shape":[' + b"0," * (big // 2) + b"0]}}"),
        "escapes": file_of(b'{"' + b"\\n" * (big // 2)),
        "spaces": file_of(b"{" + b" " * big),
        "metadata": file_of(b'{"__metadata__":{' + b'"a":"b",' * (big // 8) + b'"a":"b"}}'),
    }
    for name, data in files.items():
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb:  # 120 MB in 120 kB
        torch.save({"weight": torch.zeros(2, 2)}, tmp_path / "seed.zip")
        with zipfile.ZipFile(tmp_path / "seed.zip") as seed:
            for name in seed.namelist():
                bomb.writestr(name, seed.read(name) if "data/0" not in name else bytes(120_000_000))
    paths = [str(path) for path in sorted(tmp_path.iterdir()) if path.suffix != ".zip"]
    command = [sys.executable, "-c", SWEEP, str(ROOT), str(ROOT / "06_finetune"), *paths]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(paths) == len(files) + 1
    for line in lines:
        seconds, python, process, words = line.split("|")
        assert float(seconds) < 5 and int(python) < 40e6 and int(process) < 100e6 and "is refused: " in words, line


# ---------------------------------------------------------------------------------------------- other places
@pytest.mark.parametrize("name", ["missing.safetensors", "missing.bin", "missing.index.json", "a\0b", "x" * 300])
def test_a_missing_file(tmp_path, name):
    with pytest.raises(utils.InputError, match="is not there|cannot be read"):
        weights.open_weights(tmp_path / name)


def test_a_folder(tmp_path):
    with pytest.raises(utils.InputError, match="holds none of model.safetensors, .*; name a file"):
        weights.open_weights(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    torch.save({"bin": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert list(weights.open_weights(tmp_path)) == ["bin"]
    (tmp_path / "model.safetensors").rmdir()
    weights.save_safetensors({"safe": torch.ones(2)}, tmp_path / "model.safetensors")
    assert list(weights.open_weights(tmp_path)) == ["safe"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(utils.InputError, match="is no file"):
        weights.open_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.index.json"])
def test_a_file_that_may_not_be_read(tmp_path, monkeypatch, name):
    weights.save_safetensors({"a": torch.ones(2)}, tmp_path / name)
    if os.name == "nt" or os.geteuid() == 0:  # nothing is forbidden to root

        def deny(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("builtins.open", deny)
        monkeypatch.setattr("io.open", deny)
        monkeypatch.setattr(torch, "load", deny)
    else:
        os.chmod(tmp_path / name, 0)
    with pytest.raises(utils.InputError, match="cannot be read .Permission denied.; check the path and its perm"):
        weights.open_weights(tmp_path / name)


# ---------------------------------------------------------------------------------------------- shards
@pytest.fixture
def shards(tmp_path):
    """Two shards; returns a function that writes an index for them, changed as asked."""
    first = {"a": torch.ones(2), "b": torch.zeros(3)}
    weights.save_safetensors(first, tmp_path / "model-1.safetensors", {"format": "pt"})
    weights.save_safetensors({"c": torch.arange(4)}, tmp_path / "model-2.safetensors")
    places = {"a": "model-1.safetensors", "c": "model-2.safetensors", "b": "model-1.safetensors"}

    def index(**changes):
        path = tmp_path / "model.safetensors.index.json"
        places.update(changes)
        weight_map = {name: place for name, place in places.items() if place is not None}
        index = {"metadata": {"total_size": 52.0, "deep": [{}]}, "weight_map": weight_map}
        path.write_text(json.dumps(index, indent=2))
        return path

    return index


def test_shards_read_as_one(tmp_path, shards):
    for opened in (weights.open_weights(shards()), weights.open_weights(tmp_path)):
        assert sorted(opened) == ["a", "b", "c"]
        assert torch.equal(opened["c"], torch.arange(4)) and torch.equal(opened["a"], torch.ones(2))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"c": "../model-2.safetensors"}, "not the name of a .safetensors file in the same folder"),
        ({"c": "/etc/passwd"}, "not the name of a .safetensors file in the same folder"),
        ({"c": "sub/../../model-2.safetensors"}, "not the name of a .safetensors file"),
        ({"c": "..\\model-2.safetensors"}, "not the name of a .safetensors file"),
        ({"c": "C:model-2.safetensors"}, "not the name of a .safetensors file"),
        ({"c": "model-2.bin"}, "not the name of a .safetensors file"),
        ({"c": "model-2.safetensors\n"}, "not the name of a .safetensors file"),
        ({"c": "\0.safetensors"}, "not the name of a .safetensors file"),
        ({"c": ""}, "not the name of a .safetensors file"),
        ({"c": 5}, "no weight_map"),
        ({"d": "model-2.safetensors"}, "disagree on whether tensor 'd' is in there"),
        ({"b": None}, "disagree on whether tensor 'b' is in there"),
        ({"b": "model-2.safetensors"}, "disagree on whether tensor 'b' is in there"),
    ],
)
def test_an_index_that_does_not_fit_its_shards(shards, changes, message):
    path = shards(**changes)
    with pytest.raises(utils.InputError, match=message) as caught:
        weights.open_weights(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_broken_shard_is_named(tmp_path, shards):
    (tmp_path / "model-2.safetensors").write_bytes(b"")
    with pytest.raises(utils.InputError, match="model-2.safetensors is refused: it has 0 bytes"):
        weights.open_weights(shards())
    with pytest.raises(utils.InputError, match="model-3.safetensors is not there"):
        weights.open_weights(shards(c="model-3.safetensors"))


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "not valid JSON"),
        (b"[]", "no weight_map"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": []}', "no weight_map"),
        (b'{"weight_map": {}, "weight_map": {}}', "twice"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "twice"),
        (b'{"weight_map": NaN}', "not valid JSON"),
        (b'{"weight_map": ' + b"[" * 200_000, "nested too deeply|not valid JSON"),
        (b'{"weight_map": {"\xff": "a"}}', "UTF-8"),
        (b'{"weight_map": %b}' % (b"1" * 10_000), "not valid JSON"),
    ],
)
def test_a_malformed_index(tmp_path, text, message):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text)
    with pytest.raises(utils.InputError, match=message):
        weights.open_weights(path)


# ---------------------------------------------------------------------------------------------- pickles
class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_pickles(tmp_path, tensors, as_zip):
    path, table = tmp_path / "pytorch_model.bin", torch.rand(4, 3)
    if not as_zip:  # PyTorch itself cannot read its later dtypes from the older format
        tensors = {name: t for name, t in tensors.items() if not re.search("F4|F8|U16|U32|U64", name)}
    tensors |= {"tied": table, "tied too": table, "transposed": table.T, "parameter": torch.nn.Parameter(table.clone())}
    torch.save(OrderedDict(tensors), path, _use_new_zipfile_serialization=as_zip)
    opened = weights.open_weights(tmp_path)
    assert same(opened, tensors)
    assert opened["tied"].data_ptr() == opened["tied too"].data_ptr() and not opened["parameter"].requires_grad
    before = path.read_bytes()
    opened["tied"].fill_(3)
    assert path.read_bytes() == before


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_code_in_a_pickle_is_not_run(tmp_path, monkeypatch, as_zip):
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    path = tmp_path / "a.bin"
    torch.save({"a": torch.ones(2), "b": Evil()}, path, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(utils.InputError, match="refused: it carries code, which is never run; ") as caught:
        weights.open_weights(path)
    path.write_bytes(pickle.dumps(Evil(), 2))
    with pytest.raises(utils.InputError, match="is refused: "):
        weights.open_weights(path)
    assert "\n" not in str(caught.value) and not (tmp_path / "evil").exists()


def test_damaged_and_unsuitable_pickles(tmp_path):
    path = tmp_path / "a.bin"
    good = {}
    for as_zip in (True, False):
        torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=as_zip)
        good[as_zip] = path.read_bytes()
    bad = [b"", b"hello", os.urandom(1000), pickle.dumps({"a": 1}), b"version https://git-lfs.github.com/spec/v1\n"]
    bad += [data[:n] for data in good.values() for n in (10, 100, len(data) // 2, len(data) - 30)]
    bad += [data[n:] for data in good.values() for n in (1, 50)]
    for data in bad:
        path.write_bytes(data)
        with pytest.raises(utils.InputError, match="is refused: it is not what torch.save writes"):
            weights.open_weights(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\0" * 10**6)
    with pytest.raises(utils.InputError, match="is refused: it is not what torch.save writes"):
        weights.open_weights(path)
    unsuitable = [
        ([torch.ones(2)], "does not hold tensors by name"),
        (torch.ones(2), "does not hold tensors by name"),
        ({1: torch.ones(2)}, "has <int>, which is not a tensor with a name"),
        ({"a": torch.ones(2), "step": 3}, "has 'step', which is not a tensor with a name"),
        ({"a": torch.ones(1).expand(10**6)}, "'a' .* claims more bytes than the file has"),
        ({"a": torch.eye(3).to_sparse()}, "'a' is sparse, has no data"),
        ({"a": torch.ones(2, device="meta")}, "'a' is sparse, has no data"),
    ]
    for state, message in unsuitable:
        torch.save(state, path)
        with pytest.raises(utils.InputError, match=message):
            weights.open_weights(path)


# ---------------------------------------------------------------------------------------------- writing
@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"__metadata__": torch.ones(2)}, "'__metadata__' .*give it another name"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "'a' .torch.complex128"),
        ({"a": torch.eye(2).to_sparse()}, "'a' .*torch.sparse_coo"),
        ({"a": torch.ones(2, device="meta")}, "'a' .*meta"),
        ({"a": torch.zeros((), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, "'a' .torch.float4_e2m1fn_x2"),
    ],
)
def test_what_cannot_be_written(tmp_path, tensors, message):
    (tmp_path / "a.safetensors").write_bytes(b"old")
    with pytest.raises(utils.InputError, match=message):
        weights.save_safetensors(tensors, tmp_path / "a.safetensors")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize("stop", [OSError(28, "No space left"), KeyboardInterrupt()], ids=["disk full", "Ctrl-C"])
def test_a_stopped_write_leaves_the_old_file_alone(tmp_path, monkeypatch, stop):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def fail(_):
        assert (tmp_path / f"a.safetensors.{os.getpid()}.tmp").stat().st_size > 8
        raise stop

    monkeypatch.setattr(os, "fsync", fail)
    expected = utils.InputError if isinstance(stop, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="cannot write .*No space left" if isinstance(stop, OSError) else None):
        weights.save_safetensors({"a": torch.ones(2)}, path)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(utils.InputError, match="cannot write"):
        weights.save_safetensors({"a": torch.ones(2)}, tmp_path / "file" / "a.safetensors")


# ---------------------------------------------------------------------------------------------- the script
def test_the_script_lists_and_converts(tmp_path):
    torch.save({"wörd\x1b[31m": torch.ones(2, 3), "half": torch.ones((), dtype=torch.bfloat16)}, tmp_path / "a.bin")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "a.bin"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == [r"'w\xf6rd\x1b[31m'", "float32", "(2,", "3)"] and lines[1] == ["half", "bfloat16", "()"]
    assert done.stdout.splitlines()[2] == "2 tensors, 7 parameters, 26 bytes" and done.returncode == 0
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_tensor("half"), torch.ones((), dtype=torch.bfloat16))


def test_the_script_refuses_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.safetensors").write_bytes(b"")
    monkeypatch.setattr(sys, "argv", ["weights.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: .* holds none of model.safetensors, .*; name a file or another fold"):
        utils.run(weights.main)
