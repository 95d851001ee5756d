"""The entries of a zip file, each checked before anybody looks at it.

The standard library reads the directory; the bytes are taken from the mapped file,
so that what is stored without compression is never copied. An entry's checksum is
compared at once, for every entry: 340 MB take a core 0.2 s, several less.
"""

import concurrent.futures
import mmap
import struct
import zipfile
import zlib

from clvsmim.formats._text import short

# Weights hardly shrink; what grows more than this, and to more than this, is a bomb.
GROWTH, ROOM = 20, 2**28
MANY = 2**16 - 1  # entries: their number stands elsewhere


def entries(data: mmap.mmap) -> dict[str, memoryview]:
    """{name: content} in the order of the file; views of `data` where not compressed.

    A file that carries no checksums at all (an option of torch.save) has 0 for each
    of them; then there is nothing to compare.

    Raises:
      ValueError: damaged, cut off, a failing checksum, a name that stands there twice
        or leads out of the folder, or far more content than there is file.
    """
    try:
        listed = zipfile.ZipFile(data).infolist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
        raise ValueError(
            f"its zip directory is damaged or cut off ({short(str(error))}); fetch it "
            "again"
        ) from error
    if _announced(data) not in (len(listed), MANY):
        raise ValueError(
            f"its zip directory is damaged: {len(listed)} entries are left"
        )
    if sum(x.compress_size for x in listed) > len(data):
        raise ValueError("its zip entries lie on top of each other: refused")
    if (size := sum(x.file_size for x in listed)) > max(ROOM, GROWTH * len(data)):
        raise ValueError(f"{len(data)} bytes that would grow to {size}: refused")
    found: dict[str, memoryview] = {}
    for info in listed:
        name = info.filename
        if name in found:
            raise ValueError(f"its zip directory names {short(name)} twice: refused")
        if ".." in name.split("/") or name.startswith("/") or "\\" in name:
            raise ValueError(f"its zip entry {short(name)} leads elsewhere: refused")
        try:
            found[name] = _content(data, info)
        except zlib.error as error:
            raise ValueError(f"{short(name)} does not unpack ({error})") from error
    if any(x.CRC for x in listed):
        _compare({x.filename: x.CRC for x in listed}, found)
    return found


def _announced(data: mmap.mmap) -> int:
    """How many entries the directory says at its end that it has."""
    return struct.unpack_from("<10xH", data, data.rfind(b"PK\x05\x06"))[0]


def _compare(expected: dict[str, int], found: dict[str, memoryview]) -> None:
    """Checksums of what a directory says with what there is, several at a time."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for name, value in zip(
            found, pool.map(zlib.crc32, found.values()), strict=True
        ):
            if value != expected[name]:
                raise ValueError(
                    f"the checksum of {short(name)} fails: the file is damaged; fetch "
                    "it again"
                )


def _content(data: mmap.mmap, info: zipfile.ZipInfo) -> memoryview:
    raw = _raw(data, info)
    if info.compress_type == zipfile.ZIP_DEFLATED:
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        raw = memoryview(unpacker.decompress(raw, info.file_size + 1))
        whole = unpacker.eof
    else:
        whole = info.compress_type == zipfile.ZIP_STORED
    if not whole or len(raw) != info.file_size or info.flag_bits & 1:
        raise ValueError(
            f"the zip entry {short(info.filename)} is damaged, encrypted or packed in "
            "a way that weights never are"
        )
    return raw


def _raw(data: mmap.mmap, info: zipfile.ZipInfo) -> memoryview:
    """The bytes of one entry, behind the header that repeats its name."""
    start = info.header_offset
    coding = "utf-8" if info.flag_bits & 0x800 else "cp437"
    name = info.orig_filename.encode(coding)
    fixed = data[start : start + 30]
    if len(fixed) == 30 and fixed[:4] == b"PK\x03\x04":
        behind, extra = struct.unpack("<26x2H", fixed)
        first = start + 30 + behind + extra
        last = first + info.compress_size
        if data[start + 30 : start + 30 + behind] == name and last <= len(data):
            return memoryview(data)[first:last]
    raise ValueError(
        f"the zip entry {short(info.filename)} does not lie where the directory says"
    )
