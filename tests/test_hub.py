"""Downloads against a small hub on the loopback: redirects, resumed parts, hashes, the token, the cache."""

import collections
import hashlib
import http.server
import json
import threading

import pytest

import mini_mi

WEIGHTS = bytes(range(256)) * 4096  # 1 MiB, which travels in more than one piece
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
REPO = "someone/some-model"
Request = collections.namedtuple("Request", "host path range token")


class Hub(http.server.BaseHTTPRequestHandler):
    """As the real hub: small files at once, large ones by a redirect with hash and size to another host."""

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        hub = self.server
        host, wanted = self.headers["Host"].split(":")[0], self.headers.get("Range")
        hub.requests.append(Request(host, self.path, wanted, self.headers.get("Authorization")))
        name = self.path.split("/resolve/main/")[-1]  # of other revisions, the whole path
        if self.path.startswith("/storage/"):
            return self.storage(hub.large[self.path.removeprefix("/storage/")], wanted)
        if hub.statuses:
            return self.answer(hub.statuses.pop(0))
        if name in hub.small:
            etag = hashlib.sha1(hub.small[name]).hexdigest()  # what the hub has for small files
            return self.answer(200, hub.small[name], X_Linked_Etag=f'"{etag}"')
        if name not in hub.large:
            return self.answer(404)
        linked = {"X_Linked_Etag": f'"{hub.sha256}"', "X_Linked_Size": len(hub.large[name])}
        if hub.redirect is None:
            return self.storage(hub.large[name], wanted, **linked)
        return self.answer(302, Location=hub.redirect.format(port=hub.server_port, name=name), **linked)

    def storage(self, content, wanted, **headers):
        """Send from the byte that Range asks for; hub.drops holds lengths after which the line breaks."""
        hub, begin, status = self.server, 0, 200
        if wanted and hub.ranges:
            begin, status = int(wanted.removeprefix("bytes=").split("-")[0]), 206
            if begin >= len(content):
                return self.answer(416)
        body = content[begin:]
        sent = body[: hub.drops.pop(0)] if hub.drops else body
        self.answer(status, sent, **{**headers, "Content-Length": len(body)})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.small, server.large = {"config.json": b'{"a": 1}'}, {"model.bin": WEIGHTS}
    server.requests, server.drops, server.statuses, server.sha256, server.ranges = [], [], [], SHA256, True
    server.handle_error = lambda *args: None  # clients that leave early are no news
    server.redirect = "http://localhost:{port}/storage/{name}"  # for a client another host than 127.0.0.1
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    for name in ("HF_TOKEN HF_TOKEN_PATH HF_HUB_CACHE HF_HUB_OFFLINE XDG_CACHE_HOME "
                 "http_proxy HTTP_PROXY").split():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(mini_mi.time, "sleep", lambda seconds: None)
    yield server
    server.shutdown()
    server.server_close()


def refused(match, error=mini_mi.UserError, name="model.bin", repo=REPO):
    with pytest.raises(error, match=match) as caught:
        mini_mi.fetch(repo, name)
    assert "\n" not in str(caught.value)


def leftovers(tmp_path):
    return sorted(path.name for path in tmp_path.rglob("*") if path.is_file())


def test_redirect_is_followed_and_the_file_verified(hub, tmp_path):
    path = mini_mi.fetch(REPO, "model.bin")
    assert path.read_bytes() == WEIGHTS and (tmp_path / "home") in path.parents
    assert [(r.host, r.path) for r in hub.requests] == [
        ("127.0.0.1", f"/{REPO}/resolve/main/model.bin"), ("localhost", "/storage/model.bin")]
    assert leftovers(tmp_path) == ["model.bin"]


def test_cache_is_asked_before_the_network(hub, monkeypatch):
    path = mini_mi.fetch(REPO, "model.bin")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert mini_mi.fetch(REPO, "model.bin") == path
    refused("cannot fetch .*check the network", name="config.json")
    assert len(hub.requests) == 2


def test_small_file_without_sha256_is_fetched(hub, tmp_path):
    assert mini_mi.read_json(mini_mi.fetch(REPO, "config.json")) == {"a": 1}
    assert leftovers(tmp_path) == ["config.json"]


def test_dropped_connections_are_resumed(hub):
    hub.drops = [300_000, 0, 200_000]
    assert mini_mi.fetch(REPO, "model.bin").read_bytes() == WEIGHTS
    stored = [r.range for r in hub.requests if r.host == "localhost"]
    assert stored == [None, "bytes=300000-", "bytes=300000-", "bytes=500000-"]


def test_a_later_run_continues_the_part(hub, tmp_path):
    hub.drops = [100_000] + [0] * 4
    refused("cannot fetch .*100000 of 1048576.*kept")
    assert leftovers(tmp_path) == [f".model.bin.{SHA256}.part"]
    assert mini_mi.fetch(REPO, "model.bin").read_bytes() == WEIGHTS
    assert hub.requests[-1].range == "bytes=100000-"
    assert leftovers(tmp_path) == ["model.bin"]


def test_resume_without_redirect(hub):
    hub.redirect, hub.drops = None, [300_000]
    assert mini_mi.fetch(REPO, "model.bin").read_bytes() == WEIGHTS
    assert [r.range for r in hub.requests] == [None, "bytes=300000-"]


def test_server_that_ignores_range_sends_all_again(hub):
    hub.drops, hub.ranges = [300_000], False
    assert mini_mi.fetch(REPO, "model.bin").read_bytes() == WEIGHTS


@pytest.mark.parametrize("size", [len(WEIGHTS), len(WEIGHTS) + 5])
def test_part_that_the_server_cannot_continue_is_begun_again(hub, tmp_path, size):
    part = mini_mi.fetch(REPO, "config.json").with_name(f".model.bin.{SHA256}.part")
    part.write_bytes(b"x" * size)  # 416 is the answer to that
    assert mini_mi.fetch(REPO, "model.bin").read_bytes() == WEIGHTS
    assert leftovers(tmp_path) == ["config.json", "model.bin"]


def test_part_of_another_version_is_not_continued(hub, tmp_path):
    hub.drops = [300_000] + [0] * 4
    refused("cannot fetch")
    hub.large["model.bin"] = WEIGHTS[::-1]
    hub.sha256 = hashlib.sha256(WEIGHTS[::-1]).hexdigest()
    assert mini_mi.fetch(REPO, "model.bin").read_bytes() == WEIGHTS[::-1]
    assert leftovers(tmp_path) == ["model.bin"]


def test_part_is_not_continued_where_the_hub_names_no_hash(hub, tmp_path):
    """It might be of another version; a mirror that sends no hash begins again."""
    hub.drops = [300_000] + [0] * 4
    refused("cannot fetch")
    hub.sha256, hub.large["model.bin"] = "", WEIGHTS[::-1]
    assert mini_mi.fetch(REPO, "model.bin").read_bytes() == WEIGHTS[::-1]
    assert leftovers(tmp_path) == ["model.bin"]


def test_wrong_hash_is_refused_and_nothing_is_kept(hub, tmp_path):
    hub.sha256 = "0" * 64
    refused("model.bin arrived damaged .*000000000000")
    assert leftovers(tmp_path) == []


def test_damaged_part_is_found_out(hub, tmp_path):
    hub.drops = [300_000] + [0] * 4
    refused("cannot fetch")
    part = next(tmp_path.rglob("*.part"))
    part.write_bytes(b"x" + part.read_bytes()[1:])
    assert mini_mi.fetch(REPO, "model.bin").read_bytes() == WEIGHTS  # found out, and begun again
    assert hub.requests[-1].range is None and leftovers(tmp_path) == ["model.bin"]


def test_token_goes_to_the_hub_alone(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    hub.drops = [300_000]  # the resumed requests must not leak it either
    mini_mi.fetch(REPO, "model.bin")
    tokens = {(r.host, r.token) for r in hub.requests}
    assert tokens == {("127.0.0.1", "Bearer hf_secret"), ("localhost", None)}


@pytest.mark.parametrize("token", ["hf_abc\ndef", "hf_caf\u00e9", "hf_\u2026"])
def test_a_token_that_cannot_be_one_is_refused(hub, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(mini_mi.UserError, match="token"):
        mini_mi.fetch(REPO, "unet/config.json")


def test_token_follows_a_redirect_within_the_hub(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.redirect = "/storage/{name}"
    assert mini_mi.fetch(REPO, "model.bin").read_bytes() == WEIGHTS
    assert [r.token for r in hub.requests] == ["Bearer hf_secret"] * 2


@pytest.mark.parametrize(
    "place", ["file:///etc/hostname", "ftp://localhost/x", f"/{REPO}/resolve/main/model.bin"])
def test_redirects_that_lead_nowhere_are_refused(hub, tmp_path, place):
    hub.redirect = place
    refused("redirects lead nowhere")
    assert leftovers(tmp_path) == []


def test_refusals_of_the_hub_are_told_apart(hub, tmp_path):
    refused("404", mini_mi.NotOnHub, name="absent.bin")
    for status in (401, 403):
        hub.statuses = [status]
        refused(f"{status}.*HF_TOKEN")
    hub.statuses = [503, 429]
    assert mini_mi.fetch(REPO, "model.bin").exists()  # tried again
    hub.statuses = [500] * 9
    refused("the server answered 500", name="config.json")
    refused("neither a model folder nor a hub repository", repo="no/such/folder")
    refused("neither a model folder nor a hub repository", repo="../..")


def test_no_network_fails_at_once(hub, monkeypatch):
    monkeypatch.setattr(mini_mi.time, "sleep", lambda seconds: pytest.fail("waits although nobody is there"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused("cannot fetch http://127.0.0.1:9.*check the network")
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    refused("HF_ENDPOINT should look like")


def test_full_disk_and_unwritable_cache(hub, tmp_path, monkeypatch):
    """One line; what fitted is kept, and goes on when there is room."""
    class Full:
        """A file on a disk with room for half of it."""

        def __init__(self, path, mode):
            self.file = open(path, mode)

        def write(self, block):
            self.file.write(block[:1 << 19])
            raise OSError(28, "No space left on device")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    with monkeypatch.context() as patch:
        patch.setattr(mini_mi, "open", Full, raising=False)
        refused("cannot write .*model.bin .No space left on device.: make room")
    assert leftovers(tmp_path) == [f".model.bin.{SHA256}.part"]
    assert mini_mi.fetch(REPO, "model.bin").read_bytes() == WEIGHTS
    assert hub.requests[-1].range == "bytes=524288-"
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    refused("cannot write .*HF_HOME")


MODEL = ("tokenizer/vocab.json tokenizer/merges.txt tokenizer/tokenizer_config.json text_encoder/config.json "
         "vae/config.json unet/config.json scheduler/scheduler_config.json").split()


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_model_is_fetched_safetensors_first_and_works_offline(hub, monkeypatch):
    hub.small = {name: json.dumps({"file": name}).encode() for name in MODEL}
    weights = ["text_encoder/pytorch_model.bin", "vae/diffusion_pytorch_model.safetensors",
               "vae/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.bin"]
    hub.large = dict.fromkeys(weights, WEIGHTS)
    folder = mini_mi.fetch_model("zeroscope")
    assert hub.requests[0].path.startswith("/cerspense/zeroscope_v2_576w/resolve/main/")
    # special_tokens_map.json is absent, and of the VAE's weights only the safe ones were taken.
    assert names(folder) == {*MODEL, *weights} - {"vae/diffusion_pytorch_model.bin"}
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert mini_mi.fetch_model("zeroscope") == folder


def test_sharded_and_fp16_weights_and_tokenizers_of_today_are_fetched(hub):
    """Each part in another of the forms in circulation."""
    shards = ["diffusion_pytorch_model-00001-of-00002.safetensors",
              "diffusion_pytorch_model-00002-of-00002.safetensors"]
    index = json.dumps({"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}).encode()
    hub.small = {name: b"{}" for name in MODEL if not name.startswith("tokenizer")}
    hub.small |= {"tokenizer/tokenizer.json": b"{}", "tokenizer/tokenizer_config.json": b"{}",
                  "unet/diffusion_pytorch_model.safetensors.index.json": index}
    hub.large = dict.fromkeys(["text_encoder/model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.bin",
                               *(f"unet/{shard}" for shard in shards)], WEIGHTS)
    folder = mini_mi.fetch_model(REPO)
    assert names(folder) == {*hub.small, *hub.large}
    before = len(hub.requests)
    assert mini_mi.fetch_model(REPO) == folder and len(hub.requests) == before  # nothing is asked again


def test_weights_at_the_root_of_a_repository(hub):
    hub.small, hub.large = {"config.json": b"{}", "tokenizer.json": b"{}"}, {"pytorch_model.bin": WEIGHTS}
    folder = mini_mi.fetch_weights(REPO, "", "model")
    assert mini_mi.fetch_tokenizer(REPO, "") == folder
    assert names(folder) == {"config.json", "tokenizer.json", "pytorch_model.bin"}


def test_an_index_that_names_files_elsewhere_is_refused(hub):
    index = json.dumps({"weight_map": {"a": "../../secret.safetensors"}}).encode()
    hub.small = {"unet/config.json": b"{}", "unet/diffusion_pytorch_model.safetensors.index.json": index}
    with pytest.raises(mini_mi.UserError, match="index.json cannot be used .*secret"):
        mini_mi.fetch_weights(REPO, "unet/", "diffusion_pytorch_model")


def test_a_model_that_lacks_a_file_is_not_complete(hub):
    hub.small = {name: b"{}" for name in MODEL if name != "unet/config.json"}
    hub.large = {"text_encoder/model.safetensors": WEIGHTS,
                 "vae/diffusion_pytorch_model.safetensors": WEIGHTS}
    for _ in range(2):
        with pytest.raises(mini_mi.NotOnHub, match="unet/config.json"):
            mini_mi.fetch_model(REPO)
    hub.small["unet/config.json"] = b"{}"
    with pytest.raises(mini_mi.NotOnHub, match="unet/diffusion_pytorch_model.safetensors"):
        mini_mi.fetch_model(REPO)


# What huggingface_hub left, and its settings

def snapshot(cache, files, revision="main"):
    """A repository as huggingface_hub keeps it: a reference to a commit, and the commit's files."""
    store, commit = cache / f"models--{REPO.replace('/', '--')}", "c0ffee" * 6 + "c0ff"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / revision).write_text(commit)
    for name, content in files.items():
        (store / "snapshots" / commit / name).parent.mkdir(parents=True, exist_ok=True)
        (store / "snapshots" / commit / name).write_bytes(content)
    return store / "snapshots" / commit


@pytest.mark.parametrize("setting, place", [("HF_HOME", "hub"), ("HF_HUB_CACHE", ".")])
def test_what_huggingface_hub_downloaded_is_used(hub, tmp_path, monkeypatch, setting, place):
    """Whatever its form is, nothing is asked of the hub; a commit or another revision is found as well."""
    files = {**{name: b"{}" for name in MODEL}, "text_encoder/model.fp16.safetensors": WEIGHTS,
             "vae/diffusion_pytorch_model.bin": WEIGHTS, "unet/diffusion_pytorch_model.safetensors": WEIGHTS}
    monkeypatch.setenv(setting, str(tmp_path / "theirs"))
    folder = snapshot(tmp_path / "theirs" / place, files)
    assert mini_mi.fetch_model(REPO) == mini_mi.fetch_model(f"{REPO}@{folder.name}") == folder
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert mini_mi.fetch_model(REPO) == folder and hub.requests == []


def test_a_snapshot_that_lacks_a_file_is_completed_at_its_commit(hub, tmp_path):
    folder = snapshot(tmp_path / "home" / "hub", {"config.json": b"{}"})
    assert mini_mi.fetch(REPO, "config.json").parent == folder and hub.requests == []
    hub.small[f"/{REPO}/resolve/{folder.name}/other.json"] = b"{}"
    assert mini_mi.fetch(REPO, "other.json") == folder / "other.json"
    assert hub.requests[0].path.endswith(f"/resolve/{folder.name}/other.json")


def test_a_revision_is_asked_for(hub):
    hub.small[f"/{REPO}/resolve/refs%2Fpr%2F1/config.json"] = b"{}"
    path = mini_mi.fetch(f"{REPO}@refs/pr/1", "config.json")
    assert hub.requests[0].path == f"/{REPO}/resolve/refs%2Fpr%2F1/config.json"
    assert path != mini_mi.fetch(REPO, "config.json")
    assert mini_mi.local_folder(f"{REPO}@refs/pr/1") is None and mini_mi.local_folder("zeroscope@v1") is None
    refused("neither a model folder nor a hub repository", repo=f"{REPO}@../..")


def test_offline_asks_no_one(hub, monkeypatch):
    path = mini_mi.fetch(REPO, "config.json")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert mini_mi.fetch(REPO, "config.json") == path
    refused("HF_HUB_OFFLINE forbids", mini_mi.NotOnHub)
    assert len(hub.requests) == 1


@pytest.mark.parametrize("setting", ["HF_HOME", "HF_TOKEN_PATH"])
def test_the_stored_token_counts(hub, tmp_path, monkeypatch, setting):
    (tmp_path / "home").mkdir()
    file = tmp_path / "home" / "token" if setting == "HF_HOME" else tmp_path / "elsewhere"
    file.write_text("hf_stored\n")
    if setting == "HF_TOKEN_PATH":
        monkeypatch.setenv(setting, str(file))
    mini_mi.fetch(REPO, "model.bin")
    assert [r.token for r in hub.requests] == ["Bearer hf_stored", None]
    monkeypatch.setenv("HF_TOKEN", "hf_given")
    mini_mi.fetch(REPO, "config.json")
    assert hub.requests[-1].token == "Bearer hf_given"


def test_the_message_names_the_proxy_without_its_password(hub, monkeypatch):
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:9")
    with pytest.raises(mini_mi.UserError, match="proxy 127.0.0.1:9 ") as caught:
        mini_mi.fetch(REPO, "model.bin")
    assert "secret" not in str(caught.value)


def test_a_finished_part_is_verified_not_fetched_again(hub, tmp_path):
    """A process that was ended while it hashed left it."""
    part = mini_mi.fetch(REPO, "config.json").with_name(f".model.bin.{SHA256}.part")
    part.write_bytes(WEIGHTS)
    hub.drops = [0] * 9  # a body would arrive empty
    assert mini_mi.fetch(REPO, "model.bin").read_bytes() == WEIGHTS
    assert leftovers(tmp_path) == ["config.json", "model.bin"]


def test_no_wait_after_the_last_try(hub, monkeypatch):
    waits = []
    monkeypatch.setattr(mini_mi.time, "sleep", waits.append)
    hub.statuses = [500] * 9
    refused("the server answered 500", name="config.json")
    assert waits == [0.5, 1, 2, 4]
