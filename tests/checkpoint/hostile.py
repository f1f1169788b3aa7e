"""Files made to harm whoever loads them. Each case writes one and returns what is to be loaded.

None may execute anything: whatever code they carry touches `canary`. Used by tests/checkpoint/test_hostile.py and by
benchmarks/hostile.py, which also measures memory.
"""

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from diptych.checkpoint.formats import conventions, native, open_clip, openai, transformers
from samples import TINY_VIT, make_loaded, small

Case = Callable[[Path, Path], Path]
"""(empty folder, canary) -> what to load."""

CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


# --- honest material to spoil ----------------------------------------------------------------------------------------


@cache
def honest() -> Any:
    return make_loaded(small(TINY_VIT))


def state() -> dict[str, torch.Tensor]:
    return conventions.openai_state(honest().model.state_dict().items())


def header() -> tuple[dict[str, Any], bytes]:
    """Header and data of an honest safetensors file."""
    from safetensors.torch import save

    raw = save(state())
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_safetensors(folder: Path, head: Any, data: bytes) -> Path:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    path = folder / "weights.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    honest().tokenizer.save(folder)
    return path


def spoil(change: Callable[[dict[str, Any]], None]) -> Case:
    """A safetensors file whose header was changed."""

    def build(folder: Path, canary: Path) -> Path:
        head, data = header()
        change(head)
        return write_safetensors(folder, head, data)

    return build


def write_zip(folder: Path, members: dict[str, bytes], **options: Any) -> Path:
    path = folder / "weights.pt"
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    honest().tokenizer.save(folder)
    return path


def members() -> dict[str, bytes]:
    """What an honest archive of torch.save holds."""
    buffer = io.BytesIO()
    torch.save(state(), buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def with_pickle(data: bytes) -> Case:
    """An archive with this data.pkl and the honest storages."""
    return lambda folder, canary: write_zip(folder, {**members(), "archive/data.pkl": data})


def command(canary: Path) -> str:
    return f"touch {canary}"


class Reduce:
    """Pickles as a call of whatever is wanted."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def tensor_pickle(
    shape: tuple[int, ...] = (2, 2),
    stride: tuple[int, ...] = (2, 1),
    offset: int = 0,
    numel: int = 4,
    key: str = "0",
    storage: str = "FloatStorage",
    function: str = "_rebuild_tensor_v2",
) -> bytes:
    """The state dict {"logit_scale": tensor} in pickle's protocol 2, with these claims about the tensor."""

    def number(value: int) -> bytes:
        return f"L{value}L\n".encode()

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def many(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    persistent = (
        b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text(key) + text("cpu") + number(numel) + b"tQ"
    )
    rest = number(offset) + many(shape) + many(stride) + b"\x89ccollections\nOrderedDict\n)R"
    call = f"ctorch._utils\n{function}\n".encode() + b"(" + persistent + rest + b"tR"
    return b"\x80\x02}" + text("logit_scale") + call + b"s."


def tensor_case(data: bytes = b"\0" * 16, **claims: Any) -> Case:
    return lambda folder, canary: write_zip(
        folder, {"archive/data.pkl": tensor_pickle(**claims), "archive/data/0": data, "archive/version": b"3\n"}
    )


def write_folder(folder: Path, layout: Any) -> Path:
    (folder / "model").mkdir()
    layout.write(folder / "model", honest())
    if layout is open_clip:
        honest().tokenizer.save(folder / "model")
    return folder / "model"


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change checkpoint.json and make its hash fit again."""

    def all_of_it(record: dict[str, Any]) -> None:
        record.pop("self")
        change(record)
        record["self"] = native._fingerprint(record)

    edit_json(folder / native.DESCRIPTION, all_of_it)
    return folder


# --- pickles ---------------------------------------------------------------------------------------------------------


@case
def pickle_calls_os_system(folder: Path, canary: Path) -> Path:
    return with_pickle(pickle.dumps({"a": Reduce(os.system, command(canary))}, 2))(folder, canary)


@case
def pickle_calls_eval(folder: Path, canary: Path) -> Path:
    return with_pickle(pickle.dumps({"a": Reduce(eval, f"open({str(canary)!r}, 'w')")}, 2))(folder, canary)


@case
def pickle_calls_exec_by_stack_global(folder: Path, canary: Path) -> Path:
    return with_pickle(pickle.dumps({"a": Reduce(exec, f"open({str(canary)!r}, 'w')")}, 4))(folder, canary)


@case
def pickle_gets_an_attribute(folder: Path, canary: Path) -> Path:
    return with_pickle(pickle.dumps(Reduce(getattr, "x", "upper"), 4))(folder, canary)


@case
def pickle_walks_from_an_allowed_name(folder: Path, canary: Path) -> Path:
    names = b"\x8c\x0bcollections\x8c\x1cOrderedDict.__init__.__class__\x93"
    return with_pickle(b"\x80\x04" + names.replace(b"\x1c", b"\x1e") + b")R.")(folder, canary)


@case
def pickle_with_inst(folder: Path, canary: Path) -> Path:
    return with_pickle(b"(S'" + command(canary).encode() + b"'\nios\nsystem\n.")(folder, canary)


@case
def pickle_with_obj(folder: Path, canary: Path) -> Path:
    return with_pickle(b"(cos\nsystem\nS'" + command(canary).encode() + b"'\no.")(folder, canary)


@case
def pickle_with_newobj_ex(folder: Path, canary: Path) -> Path:
    return with_pickle(b"\x80\x04ccollections\nOrderedDict\n)}\x92.")(folder, canary)


CASES["pickle_with_extension_registry"] = with_pickle(b"\x80\x02\x82\x01)R.")
CASES["pickle_with_text_persistent_id"] = with_pickle(b"Pstorage\n.")
CASES["pickle_with_next_buffer"] = with_pickle(b"\x80\x05\x97.")
CASES["pickle_with_bytearray"] = with_pickle(b"\x80\x05\x96" + struct.pack("<Q", 1 << 62) + b".")
CASES["pickle_loads_bytes_of_another"] = with_pickle(b"\x80\x02ctorch.storage\n_load_from_bytes\n(C\x01xtR.")
CASES["pickle_calls_torch_load"] = with_pickle(b"\x80\x02ctorch\nload\n(X\x01\0\0\0xtR.")
CASES["pickle_calls_numpy_runstring"] = with_pickle(b"\x80\x02cnumpy.testing._private.utils\nrunstring\n)R.")
CASES["pickle_of_a_whole_model"] = with_pickle(b"\x80\x02copen_clip.model\nCLIP\n)\x81}b.")
CASES["pickle_builds_into_a_number"] = with_pickle(b"\x80\x02K\x01}b.")
CASES["pickle_sets_items_of_a_list"] = with_pickle(b"\x80\x02](K\x01K\x02u.")
CASES["pickle_pops_an_empty_stack"] = with_pickle(b"\x80\x020000.")
CASES["pickle_gets_what_was_never_put"] = with_pickle(b"\x80\x02h\x07.")
CASES["pickle_of_nothing"] = with_pickle(b"")
CASES["pickle_without_stop"] = with_pickle(b"\x80\x02}")
CASES["pickle_of_garbage"] = with_pickle(bytes(range(256)))
CASES["pickle_string_longer_than_the_file"] = with_pickle(b"\x80\x02X\xff\xff\xff\x7f.")
CASES["pickle_with_a_huge_number"] = with_pickle(b"\x80\x02\x8b\xff\xff\x3f\x00" + b"\x7f" * 0x3FFFFF + b".")
CASES["pickle_with_a_long_decimal"] = with_pickle(b"L" + b"9" * 100_000 + b"L\n.")
CASES["pickle_lies_about_a_frame"] = with_pickle(b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"}.")
CASES["pickle_nested_100_000_deep"] = with_pickle(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
CASES["pickle_tuples_nested_100_000_deep"] = with_pickle(b"\x80\x02)" + b"\x85" * 100_000 + b".")
CASES["pickle_that_doubles_60_times"] = with_pickle(
    b"\x80\x02}X\x05\0\0\0model]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60)) + b"s."
)
CASES["pickle_of_two_million_instructions"] = with_pickle(b"\x80\x02" + b"N0" * 1_000_000 + b"}.")
CASES["pickle_dictionary_of_colliding_keys"] = with_pickle(
    b"\x80\x02}(" + b"".join(f"L{i * (2**61 - 1)}L\nN".encode() for i in range(1, 20_000)) + b"u."
)
CASES["pickle_dictionary_that_holds_itself"] = with_pickle(b"\x80\x02}q\x00X\x05\0\0\0modelh\x00s.")
CASES["pickle_state_copied_into_many_objects"] = with_pickle(
    b"\x80\x02}("
    + b"".join(b"K%cK\x00" % i for i in range(128))
    + b"uq\x000c__torch__\nCLIP\nq\x010("
    + b"h\x01)\x81h\x00b" * 60_000
    + b"l."
)
CASES["pickle_sparse_tensor"] = with_pickle(b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n)R.")
CASES["pickle_quantized_tensor"] = tensor_case(function="_rebuild_qtensor")

# --- storages --------------------------------------------------------------------------------------------------------

CASES["storage_claims_more_than_it_has"] = tensor_case(numel=1 << 40)
CASES["storage_claims_less_than_it_has"] = tensor_case(numel=3)
CASES["tensor_larger_than_its_storage"] = tensor_case(shape=(1 << 20, 1 << 20), stride=(1 << 20, 1))
CASES["tensor_expanded_to_a_terabyte"] = tensor_case(shape=(1 << 20, 1 << 18), stride=(0, 0))
CASES["tensor_before_its_storage"] = tensor_case(offset=-4)
CASES["tensor_with_negative_strides"] = tensor_case(stride=(-2, -1), offset=3)
CASES["tensor_behind_its_storage"] = tensor_case(offset=1)
CASES["tensor_of_negative_size"] = tensor_case(shape=(-2, -2))
CASES["tensor_of_a_thousand_dimensions"] = tensor_case(shape=(1,) * 1000, stride=(0,) * 1000)
CASES["tensor_with_too_few_strides"] = tensor_case(stride=(1,))
CASES["storage_of_another_type"] = tensor_case(storage="ComplexDoubleStorage")
CASES["storage_with_a_way_out"] = tensor_case(key="../../../../etc/passwd")
CASES["storage_that_is_missing"] = tensor_case(key="7")
CASES["storage_of_an_odd_size"] = tensor_case(data=b"\0" * 15)


@case
def storage_of_which_every_block_takes_the_whole(folder: Path, canary: Path) -> Path:
    """As many tensors as a tower of 2000 blocks has, all of them views of one storage."""
    weight = torch.zeros(1 << 18)
    names = [f"visual.transformer.resblocks.{i}.mlp.{part}.weight" for i in range(2000) for part in ("c_fc", "c_proj")]
    torch.save({**state(), **dict.fromkeys(names, weight)}, folder / "weights.pt")
    honest().tokenizer.save(folder)
    return folder / "weights.pt"


# --- zip archives ----------------------------------------------------------------------------------------------------


@case
def zip_bomb_as_storage(folder: Path, canary: Path) -> Path:
    path = folder / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            "archive/data.pkl", tensor_pickle(shape=(1 << 14, 1 << 14), stride=(1 << 14, 1), numel=1 << 28)
        )
        with archive.open("archive/data/0", "w", force_zip64=True) as member:
            for _ in range(1 << 10):
                member.write(b"\0" * (1 << 20))
    return path


@case
def zip_bomb_as_pickle(folder: Path, canary: Path) -> Path:
    return write_zip(folder, {"archive/data.pkl": b"\0" * (1 << 28)}, compression=zipfile.ZIP_DEFLATED)


@case
def zip_pickle_of_64_megabytes(folder: Path, canary: Path) -> Path:
    return write_zip(folder, {"archive/data.pkl": b"N0" * (32 << 20) + b"N."})


@case
def zip_member_with_a_way_out(folder: Path, canary: Path) -> Path:
    return write_zip(folder, {**members(), f"archive/../../{canary.name}": b"x"})


@case
def zip_member_with_an_absolute_path(folder: Path, canary: Path) -> Path:
    return write_zip(folder, {**members(), str(canary): b"x"})


@case
def zip_member_twice(folder: Path, canary: Path) -> Path:
    path = write_zip(folder, members())
    with zipfile.ZipFile(path, "a") as archive:
        data = archive.read("archive/data.pkl")
        archive.fp.seek(0, 2)
        archive.NameToInfo.pop("archive/data.pkl")
        archive.writestr("archive/data.pkl", data)
    return path


@case
def zip_member_that_is_a_symlink(folder: Path, canary: Path) -> Path:
    path = folder / "link.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", tensor_pickle())
        link = zipfile.ZipInfo("archive/data/0")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    return path


@case
def zip_with_two_pickles(folder: Path, canary: Path) -> Path:
    return write_zip(folder, {**members(), "other/data.pkl": b"N."})


@case
def zip_of_something_else(folder: Path, canary: Path) -> Path:
    return write_zip(folder, {"word/document.xml": b"<xml/>"})


@case
def zip_of_another_byte_order(folder: Path, canary: Path) -> Path:
    return write_zip(folder, {**members(), "archive/byteorder": b"big"})


def patched_zip(signature: bytes, offset: int, value: bytes) -> Case:
    """Overwrite bytes behind a zip signature: of the first storage's entry in the table, or of the table's end."""

    def build(folder: Path, canary: Path) -> Path:
        path = write_zip(folder, members())
        data = bytearray(path.read_bytes())
        at = data.rindex(signature)
        if signature == b"PK\x01\x02":
            at = data.rindex(signature, 0, data.rindex(b"archive/data/0"))
        at += offset
        data[at : at + len(value)] = value
        path.write_bytes(data)
        return path

    return build


CASES["zip_table_of_contents_of_4_gigabytes"] = patched_zip(b"PK\x05\x06", 12, b"\xfe\xff\xff\xff")
CASES["zip_table_of_contents_beyond_the_end"] = patched_zip(b"PK\x05\x06", 16, b"\xfe\xff\xff\x7f")
CASES["zip_claims_65_534_members"] = patched_zip(b"PK\x05\x06", 8, b"\xfe\xff\xfe\xff" + b"\xff\xff\xff\x00")
CASES["zip_member_beyond_the_end"] = patched_zip(b"PK\x01\x02", 42, b"\xff\xff\xff\x7f")
CASES["zip_member_in_another_member"] = patched_zip(b"PK\x01\x02", 42, b"\x01\x00\x00\x00")
CASES["zip_member_larger_than_the_file"] = patched_zip(b"PK\x01\x02", 20, b"\xff\xff\xff\x7f" * 2)
CASES["zip_member_encrypted"] = patched_zip(b"PK\x01\x02", 8, b"\x01\x00")


@case
def zip_members_that_overlap(folder: Path, canary: Path) -> Path:
    """Every storage is said to lie where the largest one does: the quoted-overlap bomb, without compression."""
    names = {f"archive/data/{i}": b"\0" * (65536 + 16 * i) for i in range(2)}
    path = write_zip(folder, {"archive/data.pkl": tensor_pickle(), **names})
    data = bytearray(path.read_bytes())
    second = data.rindex(b"PK\x01\x02")
    data[second + 42 : second + 46] = struct.pack("<I", len(data) - 100)
    path.write_bytes(data)
    return path


# --- TorchScript -----------------------------------------------------------------------------------------------------


class Alien(torch.nn.Module):
    """Not CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight


@cache
def alien_archive() -> bytes:
    import warnings

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(Alien(), torch.zeros(3)), buffer)
    return buffer.getvalue()


@case
def torchscript_of_another_model(folder: Path, canary: Path) -> Path:
    path = folder / "alien.pt"
    path.write_bytes(alien_archive())
    return path


@case
def torchscript_with_evil_constants_and_code(folder: Path, canary: Path) -> Path:
    with zipfile.ZipFile(io.BytesIO(alien_archive())) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    evil = pickle.dumps(Reduce(os.system, command(canary)), 2)
    code = f"import os\nos.system({command(canary)!r})\n".encode()
    return write_zip(
        folder, {n: evil if n.endswith("constants.pkl") else code if n.endswith(".py") else d for n, d in parts.items()}
    )


CASES["torchscript_modules_in_a_circle"] = with_pickle(b"\x80\x02c__torch__\nCLIP\n)\x81q\x00}X\x01\0\0\0ah\x00sb.")
CASES["torchscript_long_names_in_a_circle"] = with_pickle(
    b"\x80\x02c__torch__\nCLIP\n)\x81q\x00}("
    + b"".join(b"X" + struct.pack("<I", 20_000) + b"%c" % sign * 20_000 + b"h\x00" for sign in b"ab")
    + b"ub."
)
CASES["torchscript_modules_without_tensors"] = with_pickle(b"\x80\x02c__torch__\nCLIP\n)\x81}b.")

# --- not weights at all ----------------------------------------------------------------------------------------------


def plain_bytes(data: bytes) -> Case:
    def build(folder: Path, canary: Path) -> Path:
        (folder / "weights.pt").write_bytes(data)
        return folder / "weights.pt"

    return build


CASES["empty_file"] = plain_bytes(b"")
CASES["one_byte"] = plain_bytes(b"P")
CASES["web_page"] = plain_bytes(b"<!DOCTYPE html><html>404</html>")
CASES["lfs_pointer"] = plain_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
CASES["zeros"] = plain_bytes(b"\0" * 4096)


@case
def bare_pickle(folder: Path, canary: Path) -> Path:
    return plain_bytes(pickle.dumps(Reduce(os.system, command(canary)), 2))(folder, canary)


@case
def legacy_torch_save(folder: Path, canary: Path) -> Path:
    torch.save({"a": torch.zeros(2)}, folder / "old.pt", _use_new_zipfile_serialization=False)
    return folder / "old.pt"


@case
def tar_with_a_way_out(folder: Path, canary: Path) -> Path:
    with tarfile.open(folder / "weights.pt", "w") as tar:
        info = tarfile.TarInfo(f"../{canary.name}")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    return folder / "weights.pt"


# --- safetensors -----------------------------------------------------------------------------------------------------


def sparse_header(length: int, size: int) -> Case:
    def build(folder: Path, canary: Path) -> Path:
        path = folder / "weights.safetensors"
        with open(path, "wb") as file:
            file.write(length.to_bytes(8, "little") + b"{")
            file.truncate(size)
        return path

    return build


CASES["safetensors_header_of_100_megabytes"] = sparse_header(100 << 20, 200 << 20)
CASES["safetensors_header_longer_than_the_file"] = sparse_header(4096, 2048)
CASES["safetensors_header_of_2_to_the_63"] = sparse_header((1 << 63) - 1, 4096)
CASES["safetensors_header_of_no_bytes"] = sparse_header(0, 4096)


def raw_header(text: bytes, data: bytes = b"\0" * 8) -> Case:
    return lambda folder, canary: write_safetensors(folder, text, data)


_ENTRY = b'{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
CASES["safetensors_no_json"] = raw_header(b"{nothing")
CASES["safetensors_no_object"] = raw_header(b"{}"[:1] + b"]")
CASES["safetensors_no_text"] = raw_header(b'{"\xff\xfe": ' + _ENTRY + b"}")
CASES["safetensors_nan"] = raw_header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [NaN, 8]}}')
CASES["safetensors_infinity"] = raw_header(b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 8]}}')
CASES["safetensors_key_twice"] = raw_header(b'{"a": ' + _ENTRY + b', "a": ' + _ENTRY + b"}")
CASES["safetensors_field_twice"] = raw_header(
    b'{"a": {"dtype": "F32", "shape": [2], "shape": [4], "data_offsets": [0, 8]}}'
)
CASES["safetensors_nested_too_deep"] = raw_header(b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}")
CASES["safetensors_a_million_keys"] = raw_header(
    b"{" + b",".join(b'"%d":{}' % i for i in range(400_000)) + b"}",
)
CASES["safetensors_huge_numbers"] = raw_header(
    b'{"a": {"dtype": "F32", "shape": [' + b"9" * 4000 + b'], "data_offsets": [0, 8]}}'
)
CASES["safetensors_number_of_100_000_digits"] = raw_header(
    b'{"a": {"dtype": "F32", "shape": [' + b"9" * 100_000 + b'], "data_offsets": [0, 8]}}'
)
CASES["safetensors_shape_overflows"] = raw_header(
    b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296, 2], "data_offsets": [0, 8]}}'
)
CASES["safetensors_a_thousand_dimensions"] = raw_header(
    b'{"a": {"dtype": "F32", "shape": [' + b",".join([b"1"] * 1000) + b'], "data_offsets": [0, 4]}}', b"\0" * 4
)
CASES["safetensors_negative_offsets"] = raw_header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}')
CASES["safetensors_fractional_offsets"] = raw_header(
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}}'
)
CASES["safetensors_true_as_a_size"] = raw_header(
    b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', b"\0" * 4
)
CASES["safetensors_text_as_offsets"] = raw_header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": "08"}}')
CASES["safetensors_unknown_type"] = raw_header(b'{"a": {"dtype": "F6", "shape": [2], "data_offsets": [0, 8]}}')
CASES["safetensors_extra_field"] = raw_header(
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "path": "/etc/passwd"}}'
)
CASES["safetensors_control_characters_in_a_name"] = raw_header(
    b'{"\\u001b[2Jgone\\n\\r": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}'
)


def _entry(head: dict[str, Any], number: int) -> dict[str, Any]:
    names = [name for name in head if name != "__metadata__"]
    return head[sorted(names, key=lambda name: head[name]["data_offsets"][0])[number]]


def _overlap(head: dict[str, Any]) -> None:
    a, b = _entry(head, 0), _entry(head, 1)
    size = b["data_offsets"][1] - b["data_offsets"][0]
    b["data_offsets"] = [a["data_offsets"][1] - 4, a["data_offsets"][1] - 4 + size]


def _beyond(head: dict[str, Any]) -> None:
    last = _entry(head, -1)
    last["data_offsets"] = [value + (1 << 30) for value in last["data_offsets"]]


CASES["safetensors_overlap"] = spoil(_overlap)
CASES["safetensors_beyond_the_end"] = spoil(_beyond)
CASES["safetensors_reversed"] = spoil(lambda head: _entry(head, 3)["data_offsets"].reverse())
CASES["safetensors_missing_tensor"] = spoil(lambda head: head.update({"other": head.pop("visual.ln_post.bias")}))
CASES["safetensors_wrong_shape"] = spoil(
    lambda head: head["text_projection"].update(shape=head["text_projection"]["shape"][::-1])
)
CASES["safetensors_integers_as_weights"] = spoil(lambda head: head["text_projection"].update(dtype="I32"))
CASES["safetensors_positions_that_are_no_square"] = spoil(
    lambda head: head["visual.positional_embedding"].update(shape=[34, 32])
)


@case
def safetensors_with_a_gap(folder: Path, canary: Path) -> Path:
    head, data = header()
    for entry in (entry for name, entry in head.items() if name != "__metadata__"):
        entry["data_offsets"] = [value + 64 for value in entry["data_offsets"]]
    return write_safetensors(folder, head, b"\0" * 64 + data)


@case
def safetensors_with_bytes_behind(folder: Path, canary: Path) -> Path:
    head, data = header()
    return write_safetensors(folder, head, data + b"#!/bin/sh\n")


# --- folders ---------------------------------------------------------------------------------------------------------


def folder_case(layout: Any, name: str, change: Callable[[dict[str, Any]], None]) -> Case:
    """A folder of a layout with one JSON file changed."""

    def build(folder: Path, canary: Path) -> Path:
        model = write_folder(folder, layout)
        edit_json(model / name, change)
        return model

    return build


def forged(change: Callable[[dict[str, Any]], None]) -> Case:
    return lambda folder, canary: forge(write_folder(folder, native), change)


CASES["config_width_of_a_trillion"] = folder_case(
    open_clip, open_clip.CONFIG, lambda c: c["model_cfg"]["vision_cfg"].update(width=1 << 40, head_width=1 << 40)
)
CASES["config_of_a_billion_layers"] = folder_case(
    open_clip, open_clip.CONFIG, lambda c: c["model_cfg"]["text_cfg"].update(layers=10**7)
)
CASES["config_patch_of_no_size"] = folder_case(
    open_clip, open_clip.CONFIG, lambda c: c["model_cfg"]["vision_cfg"].update(patch_size=0)
)
CASES["config_without_sections"] = folder_case(open_clip, open_clip.CONFIG, dict.clear)
CASES["config_text_for_numbers"] = folder_case(
    open_clip, open_clip.CONFIG, lambda c: c["model_cfg"].update(embed_dim="__import__('os')")
)
CASES["config_deviation_of_zero"] = folder_case(
    open_clip, open_clip.CONFIG, lambda c: c["preprocess_cfg"].update(std=[0, 0, 0])
)
CASES["transformers_config_of_another_model"] = folder_case(
    transformers, transformers.CONFIG, lambda c: c.update(model_type="siglip")
)
CASES["transformers_config_with_remote_code"] = folder_case(
    transformers,
    transformers.CONFIG,
    lambda c: c.update(model_type="evil", auto_map={"AutoModel": "evil.Model"}),
)
CASES["transformers_heads_of_no_width"] = folder_case(
    transformers, transformers.CONFIG, lambda c: c["text_config"].update(num_attention_heads=0)
)
CASES["transformers_vocabulary_shuffled"] = folder_case(
    transformers, "vocab.json", lambda v: v.update({"a": v["b"], "b": v["a"]})
)
CASES["transformers_preprocessor_of_a_gigapixel"] = folder_case(
    transformers, transformers.PREPROCESSOR, lambda c: c.update(size={"shortest_edge": 1 << 30}, crop_size=1 << 30)
)
CASES["forged_width_of_a_trillion"] = forged(lambda d: d["model"]["vision"].update(width=1 << 60, heads=1))
CASES["forged_image_of_a_trillion_pixels"] = forged(lambda d: d["model"]["vision"].update(image_size=1 << 40))
CASES["forged_image_and_preprocessing_of_a_trillion_pixels"] = forged(
    lambda d: (d["model"]["vision"].update(image_size=1 << 40), d["preprocess"].update(image_size=1 << 40))
)
CASES["forged_vocabulary_beyond_any_tensor"] = forged(lambda d: d["model"]["text"].update(vocab_size=1 << 62))
CASES["forged_sizes_beyond_64_bits"] = forged(lambda d: d["model"].update(embed_dim=1 << 70))
CASES["forged_layers_of_a_trillion"] = forged(lambda d: d["model"]["text"].update(layers=1 << 40))
CASES["forged_text_for_numbers"] = forged(lambda d: d["model"]["text"].update(width="a"))
CASES["forged_null_for_a_tower"] = forged(lambda d: d["model"].update(vision=None))
CASES["forged_list_for_a_model"] = forged(lambda d: d.update(model=[1]))
CASES["forged_unknown_key"] = forged(lambda d: d["model"].update(run="os.system"))
CASES["forged_mlp_ratio"] = forged(lambda d: d["model"]["text"].update(mlp_ratio=1e300))
CASES["forged_file_outside"] = forged(lambda d: d["files"].update({"../x": {"bytes": 1, "xxh3": "0"}}))
CASES["forged_file_without_hash"] = forged(lambda d: d["files"].update({"model.safetensors": {}}))
CASES["forged_file_as_number"] = forged(lambda d: d["files"].update({"model.safetensors": 7}))
CASES["forged_no_weights"] = forged(lambda d: d["files"].pop("model.safetensors"))


@case
def config_of_100_megabytes(folder: Path, canary: Path) -> Path:
    model = write_folder(folder, open_clip)
    with open(model / open_clip.CONFIG, "wb") as file:
        file.write(b'{"a": "')
        file.truncate(100 << 20)
    return model


@case
def tokenizer_nested_too_deep(folder: Path, canary: Path) -> Path:
    path = write_safetensors(folder, *header())
    (folder / "diptych_tokenizer.json").write_bytes(b"[" * 100_000)
    return path


@case
def config_nested_too_deep(folder: Path, canary: Path) -> Path:
    model = write_folder(folder, transformers)
    (model / transformers.CONFIG).write_bytes(b'{"model_type":' * 100_000 + b"1" + b"}" * 100_000)
    return model


@case
def shard_index_with_a_way_out(folder: Path, canary: Path) -> Path:
    model = write_folder(folder, transformers)
    (model / "model.safetensors").rename(folder / "outside.safetensors")
    index = {"weight_map": {"logit_scale": "../outside.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


@case
def shard_index_with_an_absolute_path(folder: Path, canary: Path) -> Path:
    model = write_folder(folder, transformers)
    (model / "model.safetensors").rename(folder / "outside.safetensors")
    index = {"weight_map": {"logit_scale": str(folder / "outside.safetensors")}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


@case
def shard_index_that_does_not_fit(folder: Path, canary: Path) -> Path:
    model = write_folder(folder, transformers)
    (model / "model.safetensors").rename(model / "one.safetensors")
    index = {"weight_map": {"logit_scale": "one.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


@case
def weights_that_are_a_pipe(folder: Path, canary: Path) -> Path:
    os.mkfifo(folder / "weights.safetensors")
    return folder / "weights.safetensors"


@case
def weights_that_never_end(folder: Path, canary: Path) -> Path:
    (folder / "weights.safetensors").symlink_to("/dev/zero")
    return folder / "weights.safetensors"


@case
def weights_that_are_a_folder(folder: Path, canary: Path) -> Path:
    model = write_folder(folder, open_clip)
    (model / open_clip.WEIGHTS[0]).unlink()
    (model / open_clip.WEIGHTS[0]).mkdir()
    return model


@case
def weights_that_link_to_themselves(folder: Path, canary: Path) -> Path:
    (folder / "weights.safetensors").symlink_to("weights.safetensors")
    return folder / "weights.safetensors"


# --- truncated at every sixteenth -------------------------------------------------------------------------------------


def _truncated(write: Callable[[Path], tuple[Path, Path]], part: int) -> Case:
    def build(folder: Path, canary: Path) -> Path:
        target, file = write(folder)
        os.truncate(file, file.stat().st_size * part // 16)
        return target

    return build


def _write_state_dict(folder: Path) -> tuple[Path, Path]:
    openai.write(folder / "weights.pt", honest())
    honest().tokenizer.save(folder)
    return folder / "weights.pt", folder / "weights.pt"


def _write_safetensors(folder: Path) -> tuple[Path, Path]:
    path = write_safetensors(folder, *header())
    return path, path


def _write_native(folder: Path) -> tuple[Path, Path]:
    model = write_folder(folder, native)
    return model, model / native.WEIGHTS


def _write_config(folder: Path) -> tuple[Path, Path]:
    model = write_folder(folder, native)
    return model, model / native.DESCRIPTION


for _name, _write in (
    ("state_dict", _write_state_dict),
    ("safetensors", _write_safetensors),
    ("native_weights", _write_native),
    ("native_description", _write_config),
):
    for _part in range(16):
        CASES[f"truncated_{_name}_at_{_part}_of_16"] = _truncated(_write, _part)


def iter_honest(folder: Path) -> Iterator[Path]:
    """The same material, unspoilt: it must load, or the cases above prove nothing."""
    for write in (_write_state_dict, _write_safetensors, _write_native):
        place = folder / write.__name__
        place.mkdir()
        yield write(place)[0]
    for layout in (open_clip, transformers):
        place = folder / layout.__name__
        place.mkdir()
        yield write_folder(place, layout)
