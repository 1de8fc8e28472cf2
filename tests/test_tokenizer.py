"""The tokenizer against transformers' CLIPTokenizer, on text that is as odd as text can be."""

import json
import random
import shutil
import unicodedata

import pytest
import torch
import transformers
from conftest import ROOT, SPECIAL, train_bpe, write_tokenizer

import mini_mi

NASTY = [
    "", " ", " \t\n\r\u00a0\u2003\u3000 ", "a", "!", "wow!!!", "wow !!! ! x!y",
    "a red star on a blue striped background",
    "A Photo of TWO Cats, 4K; 100% sharp...", "it's they're i'd we've you'll i'm 'tis rock'n'roll 'S 'T",
    "x" * 300, "the quick brown fox " * 60, "0123456789 3.14 1,000,000 x2y ²½ ٣ Ⅷ",
    "🙂", "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag", "a🚀b 🚀🚀",
    "e\u0301 = é, n\u0303o, Z\u0351\u036b\u0343\u0346alg\u0319o",
    "&amp; &lt;b&gt; &amp;amp; &amp;lt; &quot;q&quot; &#39;s &#x1F600; &eacute; &nosuch; &#0; AT&T",
    "日本語のテキスト、中文字符。 한국어",
    "naïve façade — “quoted” ‘single’ … • ™ ½", "İstanbul ISI ıi ǅ",
    "Straße STRASSE ẞ ß",
    "ΟΔΟΣ ΣΑΣ Σ ς.Σ ΑΣ' aΣ",
    "\x00\x01\x02a\x7fb\x1b[0m\x85\u200bzero\u200dwidth\ufeffbom\u2028line", "a\x1cb\x1dc\x1ed\x1fe",
    "mojibake: â€œquotesâ€\x9d Ã©tÃ©",
    "ﬁ ligature ＦＵＬＬ width ﾊﾝｶｸ", "\u1e9b\u0323 \u212b \u2126 \u1100\u1161\u11a8",
    "a_b-c/d\\e @#$%^*()[]{}|~`<>",
    "<|startoftext|>a cat<|endoftext|> b", "< |endoftext| > <|ENDOFTEXT|>",
    "العربية مع تشكيلٌ",
    "हिन्दी में पाठ", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𒀀",
    "\ud7ff\ue000\uffff \U0010ffff", "tab\tand\nnewline  double", "ſ'ſ 'ſ ʼn ΐ ΰ ŉ",
    "don't!!! can't!?!",
    "a" + "\u0301" * 40,
]


def random_strings(count):
    """Characters of all planes, in words of all lengths.

    Only such as Unicode 3.2 knew: libraries differ in their newer tables, and so on what is a letter.
    """
    rng = random.Random(5)
    known = [c for c in map(chr, range(0x20000)) if unicodedata.ucd_3_2_0.category(c) not in ("Cn", "Cs")]
    ranges = [known[32:127]] * 4 + [known[:0x250], known[0x250:0x1500], known[0x1500:0x2800], known]
    for _ in range(count):
        yield "".join(rng.choice(rng.choice(ranges)) for _ in range(rng.randrange(1, 60)))


@pytest.fixture(scope="module", params=["<|endoftext|>", "!"])
def folder(request, tmp_path_factory):
    """A tokenizer with some hundred merges of English and of the strings above, padded as CLIP or as SD 2."""
    text = (ROOT / "mini_mi.py").read_text(encoding="utf-8")[:40_000] + "!!! !! " * 50 + " ".join(NASTY) * 3
    vocab, merges = train_bpe(text, 600)
    assert ("!", "!") in merges or ("!", "!</w>") in merges  # or the pad token "!" would be no trap
    path = tmp_path_factory.mktemp("tokenizer") / "folder"
    write_tokenizer(path, vocab, merges, 77, dict(SPECIAL, pad_token=request.param))
    return path


def assert_equal_to_transformers(folder, texts, length):
    """The reference gets the cleaned text: transformers itself does not clean as OpenAI does."""
    ours = mini_mi.CLIPTokenizer.from_pretrained(folder)
    reference = transformers.CLIPTokenizer.from_pretrained(folder)
    ids = ours(texts)
    assert ids.dtype == torch.int64 and ids.shape == (len(texts), length)
    cleaned = [ours.clean(text) for text in texts]
    there = reference(cleaned, padding="max_length", truncation=True, max_length=length).input_ids
    for text, a, b in zip(texts, ids.tolist(), there):
        assert a == b, (text, reference.convert_ids_to_tokens(a), reference.convert_ids_to_tokens(b))
    assert len({tuple(row) for row in ids.tolist()}) > len(texts) // 2


def test_nasty_strings(folder):
    """Emoji, combining marks, entities, control characters, case, special tokens inside the text."""
    assert_equal_to_transformers(folder, NASTY, 77)


def test_random_strings(folder):
    """Whatever Unicode has."""
    assert_equal_to_transformers(folder, list(random_strings(400)), 77)


@pytest.mark.parametrize("name", ["tokenizer", "clip"])
def test_embedded_tokenizers(name):
    """The shipped vocabularies, with the length of the shipped text towers."""
    folder = ROOT / "data" / "tiny" / name
    length = mini_mi.CLIPTokenizer.from_pretrained(folder).length
    assert length == 24
    assert_equal_to_transformers(folder, [*NASTY, *random_strings(50)], length)


def test_pad_token_is_cut_out_of_words(folder):
    """With the pad token "!" every "!" is a token of its own; with another pad token they are merged."""
    tokenizer = mini_mi.CLIPTokenizer.from_pretrained(folder)
    bang, ids = tokenizer.vocab["!"], tokenizer(["wow!!!"])[0].tolist()
    end = ids.index(tokenizer.eos)
    if tokenizer.pad == bang:
        assert ids[end - 3:end] == [bang] * 3 and set(ids[end + 1:]) == {bang}
    else:
        assert bang not in ids and set(ids[end:]) == {tokenizer.eos}


def test_long_text_keeps_its_end_token(folder):
    """Start, L - 2 tokens, end."""
    tokenizer = mini_mi.CLIPTokenizer.from_pretrained(folder)
    row = tokenizer(["a b c d e " * 40])[0].tolist()
    assert row[0] == tokenizer.bos and row[-1] == tokenizer.eos and tokenizer.eos not in row[:-1]


@pytest.mark.parametrize("text, cleaned", [
    ("  A  Cat\n\tsat ", "a cat sat"), ("&amp;amp; &lt;b&gt;", "& <b>"), ("&amp;lt;", "<"), ("", ""),
    (" \u3000\t ", ""),
    ("e\u0301", "é"), ("Ã©tÃ©", "été"), ("“x” ‘y’", "\"x\" 'y'"),
    ("ﬁn", "fin"), ("İ", "i\u0307"),
    ("Straße", "straße"),
    ("ΟΔΟΣ", "οδος"), ("\u212b", "å"), ("\x1b[31mred\x1b[0m", "red"), ("ＦＵＬＬ", "full"),
    ("x&#0;y", "x\ufffdy")])
def test_cleaning_by_hand(text, cleaned):
    """ftfy, entities twice, spaces, lower case: what OpenAI's code does, worked out by hand."""
    assert mini_mi.CLIPTokenizer.clean(text) == cleaned


def test_special_tokens_may_be_described_by_dicts(folder, tmp_path):
    """Older files describe a token: {"content": "!", "lstrip": false, ...}."""
    vocab, merges = train_bpe("wow wow !!! ", 5)
    described = {k: dict(content=v, lstrip=False, normalized=True) for k, v in SPECIAL.items()}
    write_tokenizer(tmp_path / "t", vocab, merges, 9, {**described, "pad_token": "!"})
    tokenizer = mini_mi.CLIPTokenizer.from_pretrained(tmp_path / "t")
    assert tokenizer.pad == vocab["!"] and tokenizer.eos == vocab["<|endoftext|>"]
    assert tokenizer(["wow", ""]).shape == (2, 9)


@pytest.mark.parametrize("merges", ["pairs", "strings"])
def test_tokenizer_json_alone(folder, tmp_path, merges):
    """As transformers 5 saves it, and with the merges as older versions of tokenizers wrote them."""
    reference = transformers.CLIPTokenizer.from_pretrained(folder)
    reference.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "vocab.json").exists()
    path = tmp_path / "saved" / "tokenizer.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(whole["model"]["merges"][0], list)
    if merges == "strings":
        whole["model"]["merges"] = [" ".join(pair) for pair in whole["model"]["merges"]]
        path.write_text(json.dumps(whole), encoding="utf-8")
    ours, classic = (mini_mi.CLIPTokenizer.from_pretrained(f) for f in (tmp_path / "saved", folder))
    assert (ours.vocab, ours.rank, ours.pad, ours.special, ours.length) == (
        classic.vocab, classic.rank, classic.pad, classic.special, classic.length)
    assert_equal_to_transformers(tmp_path / "saved", [*NASTY, *random_strings(50)], 77)


@pytest.mark.parametrize("layout", ["tokenizer.json", "added_tokens.json"])
def test_added_tokens_are_one_token_each(folder, tmp_path, layout):
    """Tokens of textual inversion, of which one begins like another, in the files of two generations."""
    names = ["<my-dog>", "<My-Cat>", "<my-dog>-2", "sks"]
    reference = transformers.CLIPTokenizer.from_pretrained(folder)
    reference.add_tokens(names)
    ids = dict(zip(names, range(len(reference) - 4, len(reference))))
    if layout == "tokenizer.json":
        reference.save_pretrained(tmp_path / "saved")
    else:
        shutil.copytree(folder, tmp_path / "saved")
        (tmp_path / "saved" / layout).write_text(json.dumps(ids))
    ours = mini_mi.CLIPTokenizer.from_pretrained(tmp_path / "saved")
    row = ours(["a <my-dog>, <MY-CAT>s <my-dog>-2"])[0].tolist()
    assert [n for n in row if n in ids.values()] == [ids[name] for name in names[:3]]
    assert_equal_to_transformers(tmp_path / "saved", [
        "a <my-dog> runs", "<my-dog>s", "x<my-dog><my-dog>", "<My-Dog>", "a <my-cat>", "<my-dog>-2",
        "<my-dog>-", "sks", "SKS dog", "asksb", "< my-dog >", *NASTY], 77)


@pytest.mark.parametrize("number", [None, -1, "7", 1.5])
def test_a_token_without_a_number_is_refused_at_load(tmp_path, number):
    vocab, merges = train_bpe("wow", 1)
    write_tokenizer(tmp_path / "t", {**vocab, "w": number}, merges, 9)
    with pytest.raises(mini_mi.UserError, match="cannot be the number of a token, as it is of 'w'"):
        mini_mi.CLIPTokenizer.from_pretrained(tmp_path / "t")


@pytest.mark.parametrize("name, content, match", [
    ("added_tokens.json", '{"<dog>": 10000}', "does not fit the tokenizer .*index out of range"),
    ("tokenizer_config.json", '{"model_max_length": 77}', "does not fit the tokenizer .*77.*16")])
def test_a_tokenizer_of_another_text_encoder_is_refused(tmp_path, tiny_random, name, content, match):
    """At load, and not when a prompt is encoded."""
    model = shutil.copytree(tiny_random, tmp_path / "model")
    (model / "tokenizer" / name).write_text(content)
    with pytest.raises(mini_mi.UserError, match=match):
        mini_mi.load_models(model)


@pytest.mark.parametrize("told, length", [(None, 77), (int(1e30), 77), (1e30, 77), (24, 24), (24.0, 24)])
def test_length(folder, tmp_path, told, length):
    """Without one, or with the number by which transformers says that there is none, CLIP's 77 is taken."""
    shutil.copytree(folder, tmp_path / "t")
    config = {} if told is None else {"model_max_length": told}
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(config))
    assert mini_mi.CLIPTokenizer.from_pretrained(tmp_path / "t")(["a cat"]).shape == (1, length)


def test_a_cut_is_told(folder, capsys):
    """Once for every prompt; a prompt that fits says nothing."""
    tokenizer = mini_mi.CLIPTokenizer.from_pretrained(folder)
    tokenizer(["b " * 75])
    assert capsys.readouterr().out == ""
    for _ in range(2):
        tokenizer(["b " * 75 + "and a Zebra", "b " * 76, "a cat"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("note: the model reads 75 of the ") for line in lines)
    assert " 76 tokens" in lines[1]


def test_damaged_folders_are_refused(folder, tmp_path):
    """Each missing or wrong file is named."""
    vocab, merges = train_bpe("wow", 1)
    with pytest.raises(mini_mi.UserError, match="vocab.json"):
        mini_mi.CLIPTokenizer.from_pretrained(tmp_path)
    write_tokenizer(tmp_path / "t", vocab, merges, 9)
    (tmp_path / "t" / "merges.txt").unlink()
    with pytest.raises(mini_mi.UserError, match="merges.txt"):
        mini_mi.CLIPTokenizer.from_pretrained(tmp_path / "t")
    write_tokenizer(tmp_path / "u", {"a": 0}, [], 9)
    with pytest.raises(mini_mi.UserError, match="u cannot be used .*endoftext|startoftext"):
        with mini_mi.built_from(tmp_path / "u"):                             # as whoever loads a model does
            mini_mi.CLIPTokenizer.from_pretrained(tmp_path / "u")
