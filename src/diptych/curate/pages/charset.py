"""The characters of a page: what the Encoding and HTML standards say about which bytes mean what.

A byte order mark wins, then the Content-Type header, then a `meta` tag in the first 1024 bytes. A page that says
nothing is UTF-8 if its bytes are valid UTF-8; otherwise it is guessed, else windows-1252.
"""

import re
from collections.abc import Callable

_BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
_PRESCAN = 1024
_COMMENT = re.compile(rb"<!--.*?(?:-->|\Z)", re.DOTALL)
_META = re.compile(rb"<meta[\s/]([^>]*)", re.IGNORECASE)
_CHARSET = re.compile(rb"charset\s*=\s*[\"']?\s*([^\s\"'/>;]+)", re.IGNORECASE)
_CONTENT = re.compile(rb"http-equiv\s*=\s*[\"']?\s*content-type", re.IGNORECASE)
_ATTRIBUTE = re.compile(rb"(?:^|[\s/\"'])charset\s*=\s*[\"']?\s*([^\s\"'/>;]+)", re.IGNORECASE)

# the standard's encodings, by Python's name: labels that pages use
_LABELS = {
    "utf-8": "utf-8 utf8 unicode-1-1-utf-8 unicode11utf8 x-unicode20utf8",
    "utf-16-le": "utf-16 utf-16le unicode ucs-2 iso-10646-ucs-2 csunicode unicodefeff",
    "utf-16-be": "utf-16be unicodefffe",
    "cp1252": "windows-1252 cp1252 x-cp1252 iso-8859-1 iso8859-1 iso88591 iso_8859-1 latin1 l1 ascii us-ascii "
    "ansi_x3.4-1968 cp819 ibm819 csisolatin1 iso-ir-100 iso_8859-1:1987",
    "iso8859_2": "iso-8859-2 iso8859-2 iso88592 iso_8859-2 latin2 l2 csisolatin2 iso-ir-101 iso_8859-2:1987",
    "iso8859_3": "iso-8859-3 iso8859-3 iso_8859-3 latin3 l3",
    "iso8859_4": "iso-8859-4 iso8859-4 iso_8859-4 latin4 l4",
    "iso8859_5": "iso-8859-5 iso8859-5 iso_8859-5 cyrillic csisolatincyrillic",
    "iso8859_6": "iso-8859-6 iso8859-6 iso_8859-6 arabic iso-8859-6-e iso-8859-6-i ecma-114 asmo-708",
    "iso8859_7": "iso-8859-7 iso8859-7 iso_8859-7 greek greek8 ecma-118 elot_928 sun_eu_greek",
    "iso8859_8": "iso-8859-8 iso8859-8 iso_8859-8 hebrew visual iso-8859-8-e iso-8859-8-i logical csiso88598i",
    "iso8859_10": "iso-8859-10 iso8859-10 latin6 l6",
    "iso8859_13": "iso-8859-13 iso8859-13",
    "iso8859_14": "iso-8859-14 iso8859-14",
    "iso8859_15": "iso-8859-15 iso8859-15 iso_8859-15 l9 latin9 csisolatin9",
    "iso8859_16": "iso-8859-16",
    "cp866": "ibm866 866 cp866 csibm866",
    "cp874": "windows-874 dos-874 tis-620 iso-8859-11 iso8859-11",
    "cp1250": "windows-1250 cp1250 x-cp1250",
    "cp1251": "windows-1251 cp1251 x-cp1251",
    "cp1253": "windows-1253 cp1253 x-cp1253",
    "cp1254": "windows-1254 cp1254 x-cp1254 iso-8859-9 iso8859-9 iso_8859-9 latin5 l5 csisolatin5",
    "cp1255": "windows-1255 cp1255 x-cp1255",
    "cp1256": "windows-1256 cp1256 x-cp1256",
    "cp1257": "windows-1257 cp1257 x-cp1257",
    "cp1258": "windows-1258 cp1258 x-cp1258",
    "koi8_r": "koi8-r koi koi8 koi8_r cskoi8r",
    "koi8_u": "koi8-u koi8-ru",
    "mac_roman": "macintosh mac x-mac-roman csmacintosh",
    "mac_cyrillic": "x-mac-cyrillic x-mac-ukrainian",
    "gb18030": "gb18030 gbk gb2312 gb_2312 gb_2312-80 chinese x-gbk csgb2312 hz-gb-2312 iso-ir-58",
    "big5hkscs": "big5 big5-hkscs cn-big5 x-x-big5 csbig5",
    "euc_jp": "euc-jp x-euc-jp cseucpkdfmtjapanese",
    "iso2022_jp": "iso-2022-jp csiso2022jp",
    "cp932": "shift_jis shift-jis sjis x-sjis ms_kanji ms932 windows-31j csshiftjis",
    "cp949": "euc-kr ks_c_5601-1987 ks_c_5601-1989 ksc5601 ksc_5601 korean windows-949 cseuckr iso-ir-149",
}
_CODECS = {label: codec for codec, labels in _LABELS.items() for label in labels.split()}


def codec_of(label: str) -> str | None:
    """Python's codec for a label of a page; None for one that the standard does not know."""
    return _CODECS.get(label.strip().lower())


def declared(body: bytes, header: str) -> tuple[str | None, int]:
    """The codec that mark, header or meta tag name, and how many bytes of mark to pass over."""
    for mark, codec in _BOMS:
        if body.startswith(mark):
            return codec, len(mark)
    return codec_of(header) or _meta_codec(body[:_PRESCAN]), 0


def decode(body: bytes, header: str, guess: Callable[[bytes], str | None] | None = None) -> bytes | str:
    """The page as text, or as bytes if these are UTF-8 (valid or not): the parser reads those itself."""
    codec, mark = declared(body, header)
    if mark:
        body = body[mark:]
    if codec == "utf-8":
        return body
    if codec is None:
        if body.isascii() or _is_utf8(body):
            return body
        codec = (guess and codec_of(guess(body) or "")) or "cp1252"
        if codec == "utf-8":
            codec = "cp1252"
    return body.decode(codec, "replace")


def _is_utf8(body: bytes) -> bool:
    """Whether the bytes are UTF-8, or would be if they were not cut in the middle of a character."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


def _meta_codec(start: bytes) -> str | None:
    if b"charset" not in start.lower():
        return None
    for tag in _META.finditer(_COMMENT.sub(b"", start)):
        attributes = tag[1]
        found = _CHARSET.search(attributes) if _CONTENT.search(attributes) else _ATTRIBUTE.search(attributes)
        codec = codec_of(found[1].decode("latin-1")) if found else None
        if codec:
            return "utf-8" if codec.startswith("utf-16") else codec  # it was read as ASCII, so it is none
    return None
