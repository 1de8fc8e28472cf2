"""Downloads against a small hub on the loopback: list of files, resumed parts, hashes, token, cache."""

import collections
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest

import mini_mi

WEIGHTS = bytes(range(256)) * 4096  # 1 MiB, which travels in more than one piece
REPO, SHA, LATER = "someone/some-model", "c0ffee" * 6 + "c0ff", "beef" * 10
UNET = "unet/diffusion_pytorch_model.safetensors"
Request = collections.namedtuple("Request", "host path range token")


class Hub(http.server.BaseHTTPRequestHandler):
    """As the real hub: a list of files with sizes and hashes; large ones come by way of a redirect to
    another host."""

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
        start, _, name = self.path.partition(f"/{hub.sha}/")
        if hub.statuses:
            return self.answer(hub.statuses.pop(0))
        if self.path.startswith("/api/models/"):
            return self.answer(200, hub.listing() if hub.listing else hub.list_files())
        if hub.troubles:
            return self.answer(hub.troubles.pop(0))
        of = {f"/{REPO}/resolve": {**hub.small, **hub.large}, "/storage": hub.large}
        if name not in of.get(start, ()):
            return self.answer(404)
        if start.endswith("/resolve") and name in hub.large:
            return self.answer(302, Location=f"{hub.redirect.format(port=hub.server_port)}/{hub.sha}/{name}")
        content, begin, status = hub.files[name], 0, 200
        if wanted and hub.ranges:
            begin, status = int(wanted.removeprefix("bytes=").split("-")[0]), 206
        body = content[begin:]
        sent = body[: hub.drops.pop(0)] if hub.drops and name not in hub.small else body
        self.answer(status, sent, Content_Length=len(body))


class Server(http.server.ThreadingHTTPServer):
    """What the hub has, and what goes wrong with it: drops holds lengths after which the line breaks."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Hub)
        config = {f"{part}/config.json": b"{}" for part in mini_mi.PARTS}
        self.small = {**config, "tokenizer/vocab.json": b'{"a": 1}', "tokenizer/merges.txt": b"a b\n",
                      "tokenizer/tokenizer_config.json": b"{}", "scheduler/scheduler_config.json": b"{}",
                      "model_index.json": b"{}", "README.md": b"read me"}
        self.large = {"text_encoder/pytorch_model.bin": WEIGHTS, UNET: WEIGHTS,
                      "vae/diffusion_pytorch_model.safetensors": WEIGHTS,
                      "vae/diffusion_pytorch_model.bin": WEIGHTS, "unet/diffusion_pytorch_model.bin": WEIGHTS,
                      "unet/diffusion_pytorch_model.non_ema.safetensors": WEIGHTS, "unet/model.onnx": WEIGHTS}
        self.requests, self.drops, self.ranges, self.sha = [], [], True, SHA
        self.statuses, self.troubles = [], []  # answers in place of the next, or of the next files
        self.sha256, self.listing = hashlib.sha256(WEIGHTS).hexdigest(), None
        self.redirect = "http://localhost:{port}/storage"  # for a client another host than 127.0.0.1

    files = property(lambda self: {**self.small, **self.large})

    def handle_error(self, *args):
        """Clients that leave early are no news."""

    def list_files(self):
        files = [dict(rfilename=name, size=len(content), blobId="0" * 40)
                 | ({"lfs": dict(sha256=self.sha256, size=len(content))} if name in self.large else {})
                 for name, content in self.files.items()]
        return json.dumps(dict(id=REPO, sha=self.sha, siblings=files)).encode()

    def asked(self, start):
        return [request for request in self.requests if request.path.startswith(start)]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for name in "HF_TOKEN HF_HUB_OFFLINE http_proxy HTTP_PROXY".split():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(mini_mi, "HUB_HOME", tmp_path / "home")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    yield server
    server.shutdown()
    server.server_close()


def refused(match, *parts, repo=REPO, **options):
    with pytest.raises(mini_mi.UserError, match=match) as caught:
        mini_mi.fetch(repo, *parts or ["unet"], **options)
    assert "\n" not in str(caught.value)


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def parts_of_files(tmp_path):
    return [path.name for path in tmp_path.rglob("*.part")]


# What is fetched

def test_a_model_is_fetched_by_one_list_safetensors_first_and_works_offline(hub, tmp_path, monkeypatch):
    folder = mini_mi.model_folder(REPO)
    assert hub.requests[0].path == f"/api/models/{REPO}/revision/main?blobs=true"
    assert folder == tmp_path / "home" / "hub" / "models--someone--some-model" / "snapshots" / SHA
    assert names(folder) == {
        *hub.small, *hub.large} - {"README.md", "vae/diffusion_pytorch_model.bin", "unet/model.onnx",
                                   "unet/diffusion_pytorch_model.bin",
                                   "unet/diffusion_pytorch_model.non_ema.safetensors"}
    assert all((folder / name).read_bytes() == hub.files[name] for name in names(folder))
    assert len(hub.asked("/api/")) == 1 and {r.path.split("/")[1] for r in hub.requests} == {
        "api", "someone", "storage"}
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert mini_mi.model_folder(REPO) == folder
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert mini_mi.model_folder(REPO) == mini_mi.model_folder(f"{REPO}@{SHA}") == folder
    theirs = huggingface_hub.snapshot_download(REPO, cache_dir=folder.parents[2], local_files_only=True)
    assert theirs == str(folder)                             # the library of that cache finds it as well


def test_an_alias_names_its_repository(hub):
    refused("cerspense/zeroscope_v2_576w cannot be fetched .*404", repo="zeroscope")


def test_the_config_is_fetched_without_weights(hub):
    hub.small["unet/config.json"] = b'{"sample_size": 8}'
    assert mini_mi.read_json(mini_mi.model_folder(REPO, weights=False) / "unet" / "config.json") == {"sample_size": 8}
    assert not any(r.path.endswith((".safetensors", ".bin")) for r in hub.requests)
    hub.small["unet/config.json"] = b"changed"                  # it is not asked for again
    assert mini_mi.read_json(mini_mi.model_folder(REPO, weights=False) / "unet" / "config.json") == {"sample_size": 8} and len(hub.asked("/api/")) == 1


def test_sharded_and_fp16_weights_and_tokenizers_of_today_are_fetched(hub):
    shards = [f"unet/diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name in ("merges.txt", "vocab.json"):
        hub.small["tokenizer/tokenizer.json"] = hub.small.pop(f"tokenizer/{name}")
    hub.small |= {"tokenizer/added_tokens.json": b"{}", "mini_mi.json": b"{}"}
    hub.large = dict.fromkeys(["text_encoder/model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.bin",
                               *shards], WEIGHTS)
    assert names(mini_mi.model_folder(REPO)) == {*hub.small, *hub.large} - {"README.md"}


def test_a_clip_at_the_root_of_a_repository(hub):
    hub.small |= {"config.json": b"{}", "merges.txt": b"a b", "vocab.json": b"{}"}
    hub.large = {"pytorch_model.bin": WEIGHTS, "tf_model.h5": WEIGHTS}
    assert names(mini_mi.fetch(REPO, "")) == {
        "config.json", "merges.txt", "vocab.json", "pytorch_model.bin", "model_index.json"}


@pytest.mark.parametrize("lost", ["unet", "scheduler", "tokenizer"])
def test_a_repository_that_lacks_a_part_is_refused_before_any_download(hub, lost):
    hub.small = {name: content for name, content in hub.small.items() if not name.startswith(f"{lost}/")}
    refused(f"{REPO}: no files in {lost}/: this is no whole model", "vae", lost)
    assert len(hub.requests) == 1


def test_a_repository_without_weights_or_with_some_of_them_is_refused(hub):
    hub.large = {"unet/diffusion_pytorch_model-00002-of-00003.safetensors": WEIGHTS}
    refused("not all pieces")
    hub.large = {"unet/diffusion_pytorch_model.non_ema.safetensors": WEIGHTS}
    refused("no weights, such as unet/model.safetensors")
    assert not hub.asked(f"/{REPO}")


def test_a_revision_is_asked_for(hub):
    folder = mini_mi.fetch(f"{REPO}@refs/pr/1", "unet", weights=False)
    assert hub.requests[0].path == f"/api/models/{REPO}/revision/refs%2Fpr%2F1?blobs=true"
    hub.sha = LATER
    assert mini_mi.fetch(REPO, "unet", weights=False) == folder.with_name(LATER)
    assert mini_mi.fetch(f"{REPO}@refs/pr/1", "unet", weights=False) == folder
    for repo in (f"{REPO}@../..", f"{REPO}@/etc", "no/such/folder", "../.."):
        refused("no model folder, with unet/ in it, and no hub repository", repo=repo)


# Interrupted and damaged downloads

def test_dropped_connections_are_resumed_while_more_comes(hub, tmp_path):
    hub.drops = [300_000, 200_000]
    assert (mini_mi.fetch(REPO, "unet") / UNET).read_bytes() == WEIGHTS
    assert [r.range for r in hub.asked("/storage")] == ["bytes=0-", "bytes=300000-", "bytes=500000-"]
    assert parts_of_files(tmp_path) == []


def test_a_later_run_continues_the_part(hub, tmp_path):
    hub.drops = [100_000, 0]
    refused(f"{REPO} cannot be fetched .*100000 of 1048576.*check the network.*goes on with what came")
    assert len(parts_of_files(tmp_path)) == 1 and len(hub.asked("/storage")) == 2
    folder = mini_mi.fetch(REPO, "unet")
    assert (folder / UNET).read_bytes() == WEIGHTS and parts_of_files(tmp_path) == []
    assert hub.requests[-1].range == "bytes=100000-"


def test_a_server_that_ignores_range_is_asked_afresh_by_the_next_run(hub):
    hub.drops, hub.ranges = [300_000], False
    refused("damaged and was deleted: run it again")
    assert (mini_mi.fetch(REPO, "unet") / UNET).read_bytes() == WEIGHTS


@pytest.mark.parametrize("content, match", [
    (b"x" + WEIGHTS[1:300_000], "damaged"), (WEIGHTS + b"x", "damaged"), (WEIGHTS, None)])
def test_an_old_part_is_verified(hub, content, match):
    """Damaged or too long, it is deleted, and the next run begins afresh; whole, it is not fetched again."""
    folder = mini_mi.fetch(REPO, "unet", weights=False)
    (folder / f"{UNET}.part").write_bytes(content)
    if match:
        refused(match)
    hub.drops = [0] * 5 if match is None else []
    assert (mini_mi.fetch(REPO, "unet") / UNET).read_bytes() == WEIGHTS


def test_wrong_content_is_refused_and_not_kept(hub, tmp_path):
    hub.sha256 = "0" * 64
    refused(f"{UNET} arrived damaged and was deleted: run it again, or check HF_ENDPOINT")
    listed = hub.list_files()
    hub.listing, hub.small["vae/config.json"] = lambda: listed, b"<html>a sign-in page</html>"
    refused("vae/config.json arrived damaged", "vae", weights=False)
    found = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(found) == ["config.json", "model_index.json"]


@pytest.mark.parametrize("drops", [[], [300_000, 500_000, 200_000], [10, 20, 700_000, 100_000]])
def test_several_at_once_make_one_right_file(hub, tmp_path, drops):
    """One that ends in the same moment as another may find its part gone; its next run finds the file."""
    def attempt(_):
        try:
            return mini_mi.fetch(REPO, "unet")
        except mini_mi.UserError as error:
            assert "the next run goes on" in str(error)

    folder = mini_mi.fetch(REPO, "unet", weights=False)
    hub.drops = drops
    with ThreadPoolExecutor(3) as pool:
        assert folder in pool.map(attempt, range(3))
    assert (mini_mi.fetch(REPO, "unet") / UNET).read_bytes() == WEIGHTS


def test_full_disk_and_unwritable_cache(hub, tmp_path, monkeypatch):
    """One line; what fitted is kept, and goes on when there is room."""
    room = [1 << 19]

    def fill(source, target, size):
        target.write(source.read(room.pop() if room else 0))
        raise OSError(28, "No space left on device")

    folder = mini_mi.fetch(REPO, "unet", weights=False)
    with monkeypatch.context() as patch:
        patch.setattr(mini_mi.shutil, "copyfileobj", fill)
        refused(f"{REPO} cannot be .*No space left on device.; check .* the room in HF_HOME")
    assert (mini_mi.fetch(REPO, "unet") / UNET).read_bytes() == WEIGHTS and (folder / UNET).is_file()
    assert hub.requests[-1].range == "bytes=524288-"
    (tmp_path / "file").touch()
    monkeypatch.setattr(mini_mi, "HUB_HOME", tmp_path / "file")
    refused("cannot be read .Not a directory.*the room in HF_HOME")


# Refusals

def test_refusals_of_the_hub_are_told(hub):
    for status in (401, 403):
        hub.statuses = [status]
        refused(f"{REPO} cannot be fetched .*HTTP Error {status}.*if it is gated, HF_TOKEN")
    hub.statuses = [404]
    refused("HTTP Error 404.*its name")
    hub.statuses = [500]
    refused("HTTP Error 500.*check the network")
    hub.troubles = [403]  # the list may be had of a gated model, and its files not
    refused("HTTP Error 403.*HF_TOKEN")
    assert (mini_mi.fetch(REPO, "unet") / UNET).is_file()


@pytest.mark.parametrize("answer", [
    b"<html>", b"[]", b"{}", b'{"sha": "abc", "siblings": [{"rfilename": "x"}]}', b"\xff", b"[" * 100_000,
    b'{"sha": "../x", "siblings": []}', b'{"sha": null, "siblings": []}',
    b'{"sha": "abc", "siblings": [{"rfilename": "unet/config.json", "size": null}]}'])
def test_an_answer_that_is_no_list_of_files_is_one_line(hub, answer):
    hub.listing = lambda: answer
    refused(f"{REPO}.*(no whole model|cannot be fetched.*HF_ENDPOINT)")
    assert len(hub.requests) == 1


@pytest.mark.parametrize("place", ["file:///etc", f"/{REPO}/resolve", "http://127.0.0.1:9"])
def test_redirects_that_lead_nowhere_are_one_line(hub, place):
    hub.redirect = place
    refused(f"{REPO} cannot be fetched .*check the network")


def test_no_network_is_one_line(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused(f"{REPO} cannot be fetched .*Connection refused.*check the network")
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    refused("unknown url type: 'nonsense/.*HF_ENDPOINT")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("snapshots/main is not whole, and HF_HUB_OFFLINE forbids", weights=False)


def test_no_home_folder_is_one_line_and_only_for_the_hub(hub, monkeypatch, tiny_random):
    """As in a container that runs under a number that no user has."""
    monkeypatch.setattr(mini_mi, "HUB_HOME", Path("~/.cache/huggingface"))
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    refused("home directory.*HF_HOME")
    assert mini_mi.model_folder(tiny_random) == tiny_random
    assert (mini_mi.model_folder("tiny") / "unet").is_dir()


# Token and cache of huggingface_hub

@pytest.mark.parametrize("home, expected", [("", "~/.cache/huggingface"), ("/some/where", "/some/where")])
def test_where_the_cache_is(home, expected):
    done = subprocess.run([sys.executable, "-c", "import mini_mi; print(mini_mi.HUB_HOME)"], text=True,
                          capture_output=True, cwd=mini_mi.HERE, env={**os.environ, "HF_HOME": home})
    assert done.stdout.strip() == str(Path(expected))


@pytest.mark.parametrize("given", [True, False])
def test_the_token_goes_to_the_hub_alone(hub, tmp_path, monkeypatch, given):
    """Whether it is in HF_TOKEN or was stored by `hf auth login`."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text("hf_other" if given else "hf_secret\n")
    if given:
        monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    hub.drops = [300_000]  # the resumed requests must not show it either
    mini_mi.fetch(REPO, "unet")
    assert {(r.host, r.token) for r in hub.requests} == {
        ("127.0.0.1", "Bearer hf_secret"), ("localhost", None)}


@pytest.mark.parametrize("token", ["hf_abc\ndef", "hf_caf\u00e9", "hf_\u2026"])
def test_a_token_that_cannot_be_one_is_left_to_the_hub_to_refuse(hub, monkeypatch, token):
    """It makes neither a header of its own nor an error that shows it."""
    monkeypatch.setenv("HF_TOKEN", token)
    hub.statuses = [401]
    refused("HTTP Error 401(?!.*hf_)")
    assert hub.requests[0].token == f"Bearer {urllib.parse.quote(token)}"


def snapshot(cache, files):
    """A repository as huggingface_hub keeps it: a reference to a commit, and the commit's files."""
    store = cache / f"models--{REPO.replace('/', '--')}"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text(SHA)
    for name, content in files.items():
        blob, link = store / "blobs" / name.replace("/", "-"), store / "snapshots" / SHA / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(blob)
    return store / "snapshots" / SHA


def test_what_huggingface_hub_downloaded_is_used(hub, tmp_path):
    """Nothing is asked of the hub; a commit is found as well."""
    folder = snapshot(tmp_path / "home" / "hub", hub.files)
    hub.small, hub.large = {}, {}
    assert mini_mi.model_folder(REPO) == mini_mi.model_folder(f"{REPO}@{folder.name}") == folder
    assert hub.requests == []


def test_a_snapshot_that_lacks_a_file_is_completed_at_its_commit(hub, tmp_path):
    files = {name: content for name, content in hub.files.items() if name != "vae/config.json"}
    folder = snapshot(tmp_path / "home" / "hub", files)
    assert mini_mi.fetch(REPO, "unet") == folder and hub.requests == []
    assert mini_mi.model_folder(REPO) == folder and (folder / "vae" / "config.json").read_bytes() == b"{}"
    assert [r.path for r in hub.requests] == [
        f"/api/models/{REPO}/revision/{SHA}?blobs=true", f"/{REPO}/resolve/{SHA}/vae/config.json"]
