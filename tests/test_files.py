"""Files: safetensors against the reference package, damaged and hostile checkpoints, atomic writing."""

import contextlib
import json
import mmap
import os
import random
import shutil
import struct

import pytest
import safetensors.torch
import torch

import mini_mi


def example():
    """Tensors of every dtype, odd byte counts before wide ones, an empty one and a scalar."""
    torch.manual_seed(0)
    tensors = {f"x.{str(d).split('.')[1]}": torch.randn(3, 5).mul(50).to(d)
               for d in mini_mi.SAFETENSORS_DTYPES.values() if "float8" not in str(d)}
    return {**tensors, "a.bytes": torch.arange(7, dtype=torch.uint8), "scalar": torch.tensor(2.5),
            "empty": torch.zeros(0, 4), "transposed": torch.randn(4, 6).T}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def raw_safetensors(path, header, data=b"\0" * 16, length=None):
    """A safetensors file with exactly this header (a dict or bytes), however wrong it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def refused(path, match):
    with pytest.raises(mini_mi.UserError, match=match) as caught:
        mini_mi.load_tensors(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_our_safetensors_is_read_by_the_reference_package(tmp_path):
    path = tmp_path / "new" / "ours.safetensors"
    mini_mi.save_safetensors(path, example(), {"frames": "16"})
    assert_equal(safetensors.torch.load_file(path), example())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"frames": "16"}
    assert os.listdir(path.parent) == ["ours.safetensors"]
    assert struct.unpack("<Q", path.read_bytes()[:8])[0] % 8 == 0


def test_safetensors_of_the_reference_package_is_read(tmp_path):
    path = tmp_path / "theirs.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in example().items()}
    safetensors.torch.save_file(tensors, path, {"k": "v"})
    assert_equal(mini_mi.load_tensors(path), tensors)
    assert mini_mi.read_safetensors(path)[1] == {"k": "v"}
    safetensors.torch.save_file(tensors, path)
    assert mini_mi.read_safetensors(path)[1] == {}


def test_writing_into_a_loaded_tensor_leaves_the_file_alone(tmp_path):
    path = tmp_path / "x.safetensors"
    mini_mi.save_safetensors(path, {"x": torch.ones(4)})
    mini_mi.load_tensors(path)["x"].zero_()
    assert mini_mi.load_tensors(path)["x"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_a_file_that_cannot_be_mapped_is_read(tmp_path, monkeypatch, name):
    """Some network and container file systems map no files (ENODEV)."""
    def refuse(*args, **options):
        raise OSError(19, "No such device")

    save = torch.save if name == "x.bin" else lambda tensors, path: mini_mi.save_safetensors(path, tensors)
    save({"x": torch.arange(4.0)}, tmp_path / name)
    monkeypatch.setattr(torch, "from_file", refuse)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", refuse)
    monkeypatch.setattr(mmap, "mmap", refuse)
    assert mini_mi.load_tensors(tmp_path / name)["x"].tolist() == [0, 1, 2, 3]
    (tmp_path / "empty.safetensors").touch()
    refused(tmp_path / "empty.safetensors", "no safetensors file")


def test_unaligned_header_is_read(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    for spaces in range(8):
        data = struct.pack("<4f", 1, 2, 3, 4)
        path = raw_safetensors(tmp_path / "x.safetensors", header + b" " * spaces, data)
        assert mini_mi.load_tensors(path)["x"].tolist() == [1, 2, 3, 4]


def entry(begin=0, end=16, dtype="F32", shape=(4,)):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("header, match", [
    ({"x": entry(dtype="F4")}, "F4"),
    ({"x": entry(dtype=["F32"])}, "damaged"),
    ({"x": entry(shape=(5,))}, r"damaged.*\[5\].* invalid"),
    ({"x": entry(shape=(-2, -2))}, "damaged"),
    ({"x": entry(0, 0, shape=(0, 2**70))}, "damaged"),
    ({"x": entry(shape=(2**40, 2**40))}, "damaged.* invalid"),
    ({"x": entry(shape="4")}, "damaged"),
    ({"x": entry(4, 20)}, "gaps or overlap"),
    ({"x": entry(-16, 0)}, "gaps or overlap"),
    ({"x": entry(0, 8, shape=(2,)), "y": entry(4, 16, shape=(3,))}, "gaps or overlap"),
    ({"x": entry(0, 8, shape=(2,)), "y": entry(12, 16, shape=(1,))}, "gaps or overlap"),
    ({"x": entry(0, 32, shape=(8,))}, "damaged"),
    ({"x": entry(0, 8, shape=(2,))}, "do not end at byte 16"),
    ({"x": {"dtype": "F32"}}, "damaged"),
    ({"x": 3}, "damaged"),
    (b"[1, 2]", "no safetensors file"),
    (b"{not json", "no safetensors file"),
    (b"\xff\xfe{}", "no safetensors file"),
    (b"[" * 100_000, "no safetensors file"),
])
def test_lying_headers_are_refused(tmp_path, header, match):
    refused(raw_safetensors(tmp_path / "x.safetensors", header), match)


def test_truncated_safetensors_is_refused_at_every_length(tmp_path):
    path = tmp_path / "x.safetensors"
    mini_mi.save_safetensors(path, {"x": torch.ones(3), "y": torch.ones(2, 2)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(path, "truncated|damaged|no safetensors")
    refused(raw_safetensors(path, {}, length=2**63), "truncated")


def test_random_damage_in_a_header_never_shows_a_traceback(tmp_path):
    path, rng, kept = tmp_path / "x.safetensors", random.Random(0), 0
    mini_mi.save_safetensors(path, {"x": torch.ones(3), "y": torch.ones(2, 2)}, {"k": "v"})
    whole = path.read_bytes()
    for _ in range(600):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            kept += len(mini_mi.load_tensors(path)) > 0
        except mini_mi.UserError:
            pass
    assert 0 < kept < 600


class Attack:
    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not_run(tmp_path, legacy):
    path, Attack.marker = tmp_path / "evil.bin", tmp_path / "was-run"
    torch.save({"x": torch.ones(2), "y": Attack()}, path, _use_new_zipfile_serialization=not legacy)
    refused(path, "refused")
    assert not Attack.marker.exists()
    torch.load(path, weights_only=False)  # the attack is a real one
    assert Attack.marker.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_bin_files_load_and_truncated_ones_are_refused(tmp_path, legacy):
    path = tmp_path / "x.bin"
    tensors = {"w": torch.randn(4, 3), "p": torch.nn.Parameter(torch.ones(2))}
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    loaded = mini_mi.load_tensors(path)
    assert_equal(loaded, tensors)
    assert not loaded["p"].requires_grad
    whole = path.read_bytes()
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "refused")


def test_a_checkpoint_that_is_no_dict_of_tensors_is_refused(tmp_path):
    for content in ([torch.ones(1)], {"steps": 3}, torch.ones(2)):
        torch.save(content, tmp_path / "x.pt")
        refused(tmp_path / "x.pt", "dict of tensors")
    refused(tmp_path / "missing.safetensors", "cannot be read .No such file")
    refused(tmp_path, "cannot be read .Is a directory")


def test_read_json(tmp_path):
    path = tmp_path / "config.json"
    for encoding in ("utf-8", "utf-8-sig"):                     # the second begins with a byte order mark
        path.write_text('{"a": "\u00e9"}', encoding=encoding)
        assert mini_mi.read_json(path) == {"a": "\u00e9"}
    for content in (b"", b"{", b"\xff", b"[" * 100_000, b"[1]", b"[]", b'""', b"null"):
        path.write_bytes(content)
        with pytest.raises(mini_mi.UserError, match="config.json is not a valid JSON object"):
            mini_mi.read_json(path)
    with pytest.raises(mini_mi.UserError, match="cannot be read .No such file"):
        mini_mi.read_json(tmp_path / "missing.json")


def test_atomic_write_keeps_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "a" / "x.txt"
    with mini_mi.atomic_write(path) as temporary:
        temporary.write_text("old")
        assert temporary.name == path.name and not path.exists()
    for error in (KeyboardInterrupt, ZeroDivisionError):
        with pytest.raises(error), mini_mi.atomic_write(path) as temporary:
            temporary.write_text("half")
            raise error
    assert path.read_text() == "old" and os.listdir(path.parent) == ["x.txt"]


def test_atomic_write_to_an_impossible_place_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "x.txt", tmp_path / "folder"):
        with pytest.raises(mini_mi.UserError, match="cannot write"), mini_mi.atomic_write(path) as temporary:
            temporary.write_text("new")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"] and (tmp_path / "folder").is_dir()


# Parts as today's libraries write them, and files that are not what they seem

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12\n"


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "config.json"])
def test_a_git_lfs_pointer_is_called_that(tmp_path, name):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(mini_mi.UserError, match=f"{name} is a git-lfs pointer.*git lfs pull"):
        (mini_mi.read_json if name.endswith("json") else mini_mi.load_tensors)(tmp_path / name)


def test_a_git_lfs_pointer_that_would_be_read_as_text_is_called_that(tmp_path, tiny_random):
    """merges.txt: nothing in it looks damaged."""
    folder = shutil.copytree(tiny_random / "tokenizer", tmp_path / "tokenizer")
    (folder / "merges.txt").write_text(POINTER)
    with pytest.raises(mini_mi.UserError, match="merges.txt is a git-lfs pointer.*git lfs pull"):
        mini_mi.CLIPTokenizer.from_pretrained(folder)


def rewrite(folder, form):
    """The weights of a part under another name: "bin", "fp16", "-", "fp16-", "-fp16" (- are the pieces)."""
    whole, = folder.glob("*.safetensors")
    tensors = {k: v.clone() for k, v in mini_mi.load_tensors(whole).items()}
    whole.unlink()
    kind, stem = ("bin" if "bin" in form else "safetensors"), whole.stem
    stem = "pytorch_model" if (stem, kind) == ("model", "bin") else stem
    stem = f"{stem}{form.removesuffix('bin').strip().replace('fp16', '.fp16')}.{kind}"
    for n in range(3) if "-" in form else [0]:
        some = dict(list(tensors.items())[n::3]) if "-" in form else tensors
        path = folder / stem.replace("-", f"-0000{n + 1}-of-00003")
        torch.save(some, path) if kind == "bin" else mini_mi.save_safetensors(path, some)
    return tensors


def load_part(folder, part):
    return mini_mi.load_module(mini_mi.PARTS[part], folder, "cpu", torch.float32)


@pytest.mark.parametrize("form", ["bin", "fp16", "fp16 bin", "-", "- bin", "fp16-", "-fp16"])
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_are_found_in_every_form(tmp_path, tiny_random, form, part):
    """No index is needed, and files beside them are not looked at."""
    folder = shutil.copytree(tiny_random / part, tmp_path / part)
    tensors = rewrite(folder, form)
    for name in ("diffusion_pytorch_model.non_ema.safetensors", "model.onnx", "x.safetensors.index.json"):
        (folder / name).write_bytes(b"no weights")
    assert_equal(dict(load_part(folder, part).state_dict()), tensors)


def test_which_weights_are_taken_of_several():
    stem = "diffusion_pytorch_model"
    pieces = {f"{stem}-0000{n}-of-00002.safetensors" for n in (1, 2)}
    order = [{f"{stem}.safetensors"}, pieces, {f"{stem}.fp16.safetensors"}, {f"{stem}.bin"},
             {f"{stem}.fp16.bin"}]
    for n in range(len(order)):
        assert set(mini_mi.weight_files(set().union(*order[n:]))) == order[n]
    # A set that is not whole is passed over; a text encoder's pickles have a name of their own.
    assert mini_mi.weight_files([min(pieces), f"{stem}.bin"]) == [f"{stem}.bin"]
    assert mini_mi.weight_files(["pytorch_model.bin", "model.bin"]) == ["pytorch_model.bin"]
    # Another library's beside them, as in some repositories of CLIP.
    others = ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "adapter_model.safetensors"]
    assert mini_mi.weight_files([*others, "model.safetensors"]) == ["model.safetensors"]


def test_a_missing_shard_is_told(tmp_path, tiny_random):
    folder = shutil.copytree(tiny_random / "unet", tmp_path / "unet")
    rewrite(folder, "-")
    next(folder.glob("*-00002-*")).unlink()
    with pytest.raises(mini_mi.UserError, match="unet: no weights, .* or not all pieces"):
        load_part(folder, "unet")


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_8_bit_weights_are_refused_by_their_format(tmp_path, tiny_random, name, kind):
    """What scales them is kept elsewhere, if at all."""
    folder = shutil.copytree(tiny_random / "unet", tmp_path / "unet")
    whole, = folder.glob("*.safetensors")
    tensors = {k: v.to(getattr(torch, name)) if v.dim() > 1 else v.clone()
               for k, v in mini_mi.load_tensors(whole).items()} | {"scaled": torch.ones(1)}
    whole.unlink()
    path = whole.with_suffix(f".{kind}")
    torch.save(tensors, path) if kind == "bin" else mini_mi.save_safetensors(path, tensors)
    with pytest.raises(mini_mi.UserError, match=f"{path.name} holds torch.{name} numbers in "):
        load_part(folder, "unet")


@pytest.mark.parametrize("part, changes, match", [
    ("unet", dict(_class_name="UNetMotionModel"), "UNetMotionModel is .* only .*UNet3DConditionModel"),
    ("vae", dict(_class_name="AutoencoderTiny"), "AutoencoderTiny is .* only .*AutoencoderKL"),
    ("text_encoder", dict(architectures=["T5EncoderModel"]), "T5EncoderModel.* is .* only .*CLIPTextModel"),
    ("text_encoder", dict(architectures=7), "7 is not implemented"),
    ("text_encoder", dict(architectures=None), None)])
def test_a_part_of_another_class_is_named(tmp_path, tiny_random, part, changes, match):
    model = shutil.copytree(tiny_random, tmp_path / "model")
    path = model / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    expected = pytest.raises(mini_mi.UserError, match=f"{part}: .*{match}")
    with expected if match else contextlib.nullcontext():
        mini_mi.load_models(model)


@pytest.mark.parametrize("name, changes", [
    ("unet/config.json", dict(block_out_channels=7)),
    ("unet/config.json", dict(block_out_channels=[32, -64])),
    ("unet/config.json", dict(block_out_channels=["a", "b"])),
    ("unet/config.json", dict(layers_per_block="two")),
    ("unet/config.json", dict(norm_num_groups=0)), ("unet/config.json", dict(attention_head_dim=None)),
    ("vae/config.json", dict(block_out_channels=16)), ("vae/config.json", dict(scaling_factor=[0.18])),
    ("vae/config.json", dict(latent_channels=-4)), ("text_encoder/config.json", dict(hidden_size=[32])),
    ("text_encoder/config.json", dict(num_attention_heads=0)),
    ("text_encoder/config.json", dict(vocab_size={})),
    ("scheduler/scheduler_config.json", dict(num_train_timesteps=-1)),
    ("scheduler/scheduler_config.json", dict(beta_start="small")),
    ("scheduler/scheduler_config.json", dict(steps_offset=[1])),
    ("tokenizer/special_tokens_map.json", dict(bos_token=5)),
    ("tokenizer/tokenizer_config.json", dict(model_max_length="long")),
    ("tokenizer/tokenizer_config.json", dict(model_max_length=10**30)),
    ("tokenizer/special_tokens_map.json", dict(pad_token=["!"]))])
def test_values_of_the_wrong_kind_are_one_line_that_names_the_model(tmp_path, tiny_random, name, changes):
    """A number where a list belongs, a negative width, a token that is no text: at load, not in the
    middle."""
    model = shutil.copytree(tiny_random, tmp_path / "model")
    (model / name).write_text(json.dumps({**json.loads((model / name).read_text()), **changes}))
    try:
        mini_mi.load_models(model)
    except mini_mi.UserError as error:
        assert "\n" not in str(error) and str(model) in str(error)
    else:
        assert name.startswith("tokenizer/")  # a token that cannot be one is taken as not given


def test_unknown_fields_are_ignored_and_known_ones_are_not(tmp_path):
    fields = dict(only=dict(form="a", one=("b", "c")), width=4, parts=(1, 2, 2), rate=0.5, other=None)
    config = mini_mi.read_config("x", dict(width=8, magic=True, rate=1, other=[3], _private=0), **fields)
    assert vars(config) == dict(width=8, form="a", one="b", parts=(1, 2, 2), rate=1, other=[3])
    assert mini_mi.read_config("x", dict(one="c", parts=[2, 1]), **fields).parts == [2, 1]
    for bad in (dict(form="b"), dict(one=["b"]), dict(one="a")):
        with pytest.raises(mini_mi.UserError, match=f"{min(bad)} = .* is not implemented"):
            mini_mi.read_config("x", bad, **fields)
    for bad in (dict(width=None), dict(rate=[1]), dict(rate="half")):
        with pytest.raises((TypeError, ValueError)):                       # which `built_from` makes one line
            mini_mi.read_config("x", bad, **fields)
