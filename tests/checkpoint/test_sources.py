import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from diptych.checkpoint import layouts, sources
from diptych.errors import CheckpointError, DownloadError, NotFoundError, UsageError
from diptych.model import cost
from diptych.model.config import PRESETS
from diptych.train.plan import count_parameters
from samples import TINY_VIT, make_loaded, small

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """As much of the hub's protocol as its client library speaks when it fetches files."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.break_off: set[str] = set()
        """Files whose first transfer ends early."""
        self.corrupt: set[str] = set()
        """Files of which one byte is changed on the way, while they are in this set."""
        self.status: int | None = None
        """What every request is answered with."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def bodies(self) -> list[str]:
        return [path.rsplit("/", 1)[1] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        hub, path = self.server, self.path.split("?")[0]
        hub.requests.append((self.command, path, self.headers.get("Range")))
        repository, _, rest = path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if hub.status:
            return self.refuse(hub.status, None)
        if repository not in hub.files:
            return self.refuse(404, "RepoNotFound")
        if repository == "owner/gated":
            return self.refuse(403, "GatedRepo")
        if revision not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if name not in hub.files[repository]:
            return self.refuse(404, "EntryNotFound")
        data = hub.files[repository][name]
        is_large = not name.endswith(".json")
        git = b"blob %d\0%b" % (len(data), data)
        etag = hashlib.sha256(data).hexdigest() if is_large else hashlib.sha1(git).hexdigest()
        if name in hub.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if "Range" in self.headers else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Etag" if is_large else "ETag", f'"{etag}"')
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if not body:
            return None
        if name in hub.break_off:
            hub.break_off.discard(name)
            self.wfile.write(data[start:12_000_000])  # the client counts in blocks of 10 MB
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return None
        self.wfile.write(data[start:])
        return None

    def refuse(self, status: int, code: str | None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


def point_to(url, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between its attempts


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    point_to(server.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


STOCK = replace(small(TINY_VIT), text=replace(TINY_VIT.text, width=64, layers=1, heads=1))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """The same model in every layout that a repository may hold."""
    place = tmp_path_factory.mktemp("layouts")
    for layout in ("diptych", "open_clip", "transformers"):
        layouts.save(make_loaded(STOCK), place / layout, layout)
    return place


def publish(hub, folder, repository="owner/model"):
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    hub.files[repository] = files | {"README.md": b"read me", "huge_unneeded.bin": b"x" * 1000}
    return repository


@pytest.mark.parametrize("layout", ["diptych", "open_clip", "transformers"])
def test_a_repository_is_fetched_file_by_file_and_only_once(hub, folders, layout):
    publish(hub, folders / layout)
    loaded = layouts.load("hf-hub:owner/model")
    assert loaded.model.config.activation == "quick_gelu"
    fetched = hub.bodies()
    assert sorted(set(fetched)) == sorted(
        f.name for f in (folders / layout).iterdir() if f.name != "special_tokens_map.json"
    )
    assert len(fetched) == len(set(fetched))
    again = layouts.load("hf-hub:owner/model")
    assert hub.bodies() == fetched
    assert (again.model.logit_scale == loaded.model.logit_scale).all()


def test_a_transfer_that_breaks_off_goes_on_where_it_was(hub, folders):
    publish(hub, folders / "open_clip")
    hub.break_off.add("open_clip_model.safetensors")
    layouts.load("hf-hub:owner/model")
    ranges = [wanted for method, path, wanted in hub.requests if method == "GET" and path.endswith(".safetensors")]
    assert ranges[0] is None
    assert ranges[1] is not None
    assert ranges[1].startswith("bytes=")


def test_a_corrupted_download_is_named_and_fetched_again_the_next_time(hub, folders):
    publish(hub, folders / "open_clip")
    hub.corrupt.add("open_clip_model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"open_clip_model\.safetensors came out wrong: its sha256 is .* try again"
    ):
        layouts.load("hf-hub:owner/model")
    hub.corrupt.clear()
    layouts.load("hf-hub:owner/model")


@pytest.mark.parametrize("layout", ["diptych", "open_clip", "transformers"])
def test_half_a_file_in_the_cache_is_named_let_go_and_fetched_again(hub, folders, layout):
    publish(hub, folders / layout)
    folder = sources.resolve("hf-hub:owner/model").path
    for path in sorted(folder.iterdir()):
        os.truncate(path.resolve(), path.stat().st_size // 2)
        with pytest.raises(CheckpointError, match=rf"{path.name} came out wrong: .* it was removed, try again"):
            layouts.load("hf-hub:owner/model")
        layouts.load("hf-hub:owner/model")


def test_half_a_file_in_a_cache_that_is_read_only_is_to_be_deleted_by_its_owner(hub, folders, monkeypatch):
    publish(hub, folders / "open_clip")
    blob = (sources.resolve("hf-hub:owner/model").path / "open_clip_model.safetensors").resolve()
    os.truncate(blob, 1000)

    def refuse(path, missing_ok=False):
        raise PermissionError(path)

    monkeypatch.setattr(Path, "unlink", refuse)  # root, who runs the tests somewhere, may unlink anything
    with pytest.raises(CheckpointError, match=f"delete {blob} and try again"):
        layouts.load("hf-hub:owner/model")


def test_verify_holds_a_cached_file_to_the_hubs_hash(hub, folders):
    from diptych.checkpoint.inspect import verify

    publish(hub, folders / "open_clip")
    path = sources.resolve("hf-hub:owner/model").path / "open_clip_model.safetensors"
    assert verify("hf-hub:owner/model").checked_against["open_clip_model.safetensors"] == "sha256 of the hub"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.resolve().chmod(0o644)
    path.resolve().write_bytes(data)
    with pytest.raises(CheckpointError, match=r"open_clip_model\.safetensors is damaged: its sha256"):
        verify("hf-hub:owner/model")


def test_offline_mode_uses_the_cache_and_says_plainly_what_is_not_in_it(hub, folders, monkeypatch):
    publish(hub, folders / "transformers")
    layouts.load("hf-hub:owner/model")
    count = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    layouts.load("hf-hub:owner/model")
    with pytest.raises(DownloadError, match="hf-hub:owner/other is not in the cache, and offline mode is on"):
        layouts.load("hf-hub:owner/other")
    assert len(hub.requests) == count


def test_a_hub_that_cannot_be_reached_does_not_hide_what_is_in_the_cache(hub, folders, monkeypatch):
    publish(hub, folders / "open_clip")
    layouts.load("hf-hub:owner/model")
    point_to("http://127.0.0.1:9", monkeypatch)  # the discard port: nothing listens
    layouts.load("hf-hub:owner/model")
    with pytest.raises(DownloadError, match=r"hf-hub:owner/other: .* cannot be fetched and is not in the cache"):
        layouts.load("hf-hub:owner/other")


def test_a_hub_out_of_reach_is_asked_once(monkeypatch, tmp_path):
    point_to("http://127.0.0.1:9", monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    waits = []
    monkeypatch.setattr(_http.time, "sleep", waits.append)  # 23 seconds of them
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1:9 does not answer: .*; without a network, name a local"):
        layouts.load("hf-hub:owner/other")
    assert waits == []


def test_what_does_not_exist_is_said_in_one_line(hub, folders):
    publish(hub, folders / "open_clip")
    hub.files["owner/gated"] = {}
    hub.files["owner/empty"] = {"README.md": b""}
    hub.files["owner/half"] = {"open_clip_config.json": hub.files["owner/model"]["open_clip_config.json"]}
    hub.files["owner/evil"] = {"checkpoint.json": json.dumps({"files": {"../../x": {}}}).encode()}
    hub.files["owner/shards"] = {
        "config.json": b'{"model_type": "clip"}',
        "model.safetensors.index.json": json.dumps({"weight_map": {"a": "/etc/passwd"}}).encode(),
    }
    for source, kind, message in (
        ("hf-hub:owner/none", NotFoundError, "no such repository"),
        ("hf-hub:owner/model@other", NotFoundError, "no such revision"),
        ("hf-hub:owner/gated", DownloadError, "is gated"),
        ("hf-hub:owner/empty", CheckpointError, "holds no checkpoint of CLIP"),
        ("hf-hub:owner/half", CheckpointError, "is incomplete: it has none of open_clip_model.safetensors"),
        ("hf-hub:owner/evil", CheckpointError, "only names in its own folder"),
        ("hf-hub:owner/shards", CheckpointError, "only names in its own folder"),
        ("hf-hub:nobody", UsageError, "names no repository"),
        ("hf-hub:../../etc", UsageError, "names no repository"),
    ):
        with pytest.raises(kind, match=message) as caught:
            layouts.load(source)
        assert str(caught.value).isprintable()


def test_a_failing_hub_is_one_line(hub, folders, monkeypatch):
    publish(hub, folders / "open_clip")
    hub.status = 418
    with pytest.raises(DownloadError, match="hf-hub:owner/model"):
        layouts.load("hf-hub:owner/model")


def test_a_revision_may_be_named(hub, folders):
    publish(hub, folders / "open_clip")
    assert sources.resolve(f"hf-hub:owner/model@{COMMIT}").path.name == COMMIT


# --- published names -----------------------------------------------------------------------------------------------


def test_a_published_name_stands_for_its_repository(hub, folders):
    publish(hub, folders / "open_clip", "timm/vit_base_patch32_clip_224.openai")
    path, published = sources.resolve("ViT-B-32/openai")
    assert published.activation == "quick_gelu"
    assert (path / "open_clip_config.json").exists()
    assert sources.resolve("ViT-B-32-quickgelu/openai") == (path, published)
    assert layouts.open_checkpoint("ViT-B-32/openai").config.activation == "quick_gelu"


def change_config(hub, repository, **changes):
    record = json.loads(hub.files[repository]["open_clip_config.json"])
    record["model_cfg"] |= changes
    hub.files[repository]["open_clip_config.json"] = json.dumps(record).encode()


def test_the_table_decides_where_the_config_is_silent_and_a_contradiction_is_refused(hub, folders):
    repository = publish(hub, folders / "open_clip", "timm/vit_base_patch32_clip_224.openai")
    change_config(hub, repository, quick_gelu=None)
    opened = layouts.open_checkpoint("ViT-B-32/openai")
    assert opened.config.activation == "quick_gelu"
    assert opened.evidence["activation"] == "published as ViT-B-32/openai"
    other = publish(hub, folders / "open_clip", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K")
    change_config(hub, other, quick_gelu=True)
    with pytest.raises(
        CheckpointError, match="says quick_gelu, but ViT-B-32/laion2b_s34b_b79k was published with gelu"
    ):
        layouts.open_checkpoint("ViT-B-32/laion2b_s34b_b79k")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-32/opena", "did you mean openai|ViT-B-32/openai"),
        ("ViT-B/openai", "did you mean"),
        ("ViT-B/32", "is an architecture; name its weights too, such as ViT-B-32/"),
        ("ViT-L-14", "is an architecture; name its weights too, such as ViT-L-14/"),
        ("openai/clip-vit-base-patch32", "did you mean hf-hub:openai/clip-vit-base-patch32"),
        ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "did you mean hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        ("ViT-B-32-quickgelu/laion2b_s34b_b79k", "trained with GELU; use ViT-B-32/laion2b_s34b_b79k"),
        ("runs/none/model", "no such model: runs/none/model"),
        ("./none", "no file or folder"),
        ("none.pt", "no file or folder"),
        ("model", "published weights like ViT-B-32/openai: `diptych models` lists them"),
        ("SigLIP/webli", "`diptych models` lists the published ones"),
        ("x" * 5000, "no such model: xxx"),
    ],
)
def test_a_name_that_nobody_knows_is_answered_with_what_is_known(name, message):
    with pytest.raises((NotFoundError, UsageError), match=message):
        sources.resolve(name)


def test_a_run_that_is_not_there_is_answered_with_those_that_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/demo").mkdir(parents=True)
    with pytest.raises(NotFoundError, match=r"no such model: runs/dmo .*in runs there are demo"):
        sources.resolve("runs/dmo")


def test_a_folder_of_a_published_name_wins(tmp_path, monkeypatch, folders):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ViT-B-32").mkdir()
    (tmp_path / "ViT-B-32/openai").symlink_to(folders / "open_clip")
    assert sources.resolve("ViT-B-32/openai") == (Path("ViT-B-32/openai"), None)


def test_a_published_file_is_known_by_name_and_hash_not_by_name_alone(tmp_path, monkeypatch):
    path = tmp_path / "ViT-B-32.pt"
    path.write_bytes(b"weights")
    assert sources.find_published(path) is None
    entry = replace(sources.load_published()["ViT-B-32/openai"], sha256=hashlib.sha256(b"weights").hexdigest()[:8])
    monkeypatch.setattr(sources, "load_published", lambda: {entry.name: entry})
    assert sources.find_published(path) == entry
    assert sources.find_published(path.rename(tmp_path / "other.pt")) is None


FAMILIES = {
    # open_clip 4.2.0.dev0's 173 tags without the two of CLAP, which are of sounds
    "OpenAI": 9,
    "OpenCLIP": 19,
    "DataComp": 7,
    "CommonPool": 21,
    "DFN": 5,
    "MetaCLIP": 9,
    "SigLIP": 11,
    "SigLIP 2": 17,
    "CLIPA": 7,
    "MetaCLIP 2": 4,
    "PE-Core": 5,
    "MobileCLIP": 4,
    "MobileCLIP 2": 6,
    "ConvNeXt": 12,
    "EVA-CLIP": 7,
    "ViTamin": 15,
    "RoBERTa": 1,
    "XLM-RoBERTa": 2,
    "NLLB-CLIP": 6,
    "CoCa": 4,
}


def test_every_published_entry_is_of_a_family_and_well_formed():
    table = sources.load_published()
    assert Counter(entry.family for entry in table.values()) == FAMILIES
    assert sum(FAMILIES.values()) == 171
    for name, entry in table.items():
        assert name == entry.name
        assert entry.activation in ("quick_gelu", "gelu")
        assert (entry.repository or "").count("/") == (1 if entry.url is None else 0)
        assert entry.sha256 is None or len(entry.sha256) in (8, 64)
        assert 6e7 < entry.parameters < 6e9
        assert 224 <= entry.image_size <= 512
        assert 16 <= entry.context_length <= 77
    assert all(entry.activation == "quick_gelu" for name, entry in table.items() if name.endswith("/openai"))
    assert table["ViT-B-32/laion2b_s34b_b79k"].activation == "gelu"
    assert table["ViT-H-14/dfn5b"].resize == "squash"
    assert table["ViT-L-14/laion2b_s32b_b82k"].mean == (0.5, 0.5, 0.5)
    assert table["ViT-B-32/openai"].tokenizer is None
    assert table["ViT-H-14-CLIPA/datacomp1b"].tokenizer == {
        "name": "bert-base-uncased",
        "clean": "whitespace",
        "strip_sep_token": True,
    }


def test_parameters_of_the_table_are_those_of_the_model():
    for name, entry in sources.load_published().items():
        architecture = name.split("/")[0]
        if architecture in PRESETS:
            config = PRESETS[architecture]
            towers = cost.image_tower(config), cost.text_tower(config, config.text.context_length)
            assert entry.parameters == count_parameters(config, towers), name
            assert layouts.why_not_published(entry) is None, name


def test_published_weights_that_cannot_be_loaded_are_not_fetched(hub, monkeypatch):
    name, table = "ViT-B-32/openai", dict(sources.load_published())
    model_cfg = {**table[name].model_cfg, "text_cfg": {"text_arch": "modern"}}
    table[name] = replace(table[name], model_cfg=model_cfg)
    monkeypatch.setattr(sources, "load_published", lambda: table)
    reason = layouts.why_not_published(table[name])
    assert "text_arch" in str(reason)
    with pytest.raises(CheckpointError) as caught:
        layouts.open_checkpoint(name)
    assert str(caught.value).startswith(name)
    assert str(caught.value).endswith(f"cannot be loaded by this diptych: {reason}")
    assert hub.requests == []


def test_a_tokenizer_is_fetched_where_the_config_asks_for_one(hub, folders, tmp_path):
    repository = publish(hub, folders / "open_clip")
    files = hub.files[repository]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        files[name] = b"{}"
    assert not (sources.fetch(repository) / "tokenizer.json").exists()
    config = json.loads(files["open_clip_config.json"])
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "timm/ViT-B-16-SigLIP"
    hub.files["owner/other"] = files | {"open_clip_config.json": json.dumps(config).encode()}
    found = sources.fetch("owner/other")
    assert {"tokenizer.json", "tokenizer_config.json"} <= {file.name for file in found.iterdir()}


def test_weights_that_lie_in_no_repository_say_where_their_file_is():
    with pytest.raises(DownloadError, match=r"fetch https://.*/vit_b_16_plus_240-laion400m_e32-699c4b84\.pt and name"):
        sources.resolve("ViT-B-16-plus-240/laion400m_e32")


def test_local_paths_never_touch_the_network_nor_import_its_library(folders):
    code = (
        "import sys, socket\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "import diptych\n"
        f"diptych.load({str(folders / 'transformers')!r})\n"
        "assert 'huggingface_hub' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_line_takes_a_repository_from_the_environments_hub(hub, folders, tmp_path):
    publish(hub, folders / "open_clip")
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "diptych", "inspect", "hf-hub:owner/model"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "open_clip_config.json says quick_gelu true" in done.stdout
    offline = subprocess.run([*command[:-1], "hf-hub:owner/x"], env={**env, "HF_HUB_OFFLINE": "1"}, capture_output=True)
    assert offline.returncode == 2
    assert offline.stderr.decode().count("\n") == 1
