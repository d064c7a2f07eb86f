"""The converter of an instruct model, on a file of a few kilobytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from examples.text2sql.real_model import convert, main

HIDDEN, INNER, HEADS, BLOCK = 64, 96, 2, "blk.0."
TEMPLATE = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"


def write(file: Path) -> dict[str, np.ndarray]:
    """Write a Llama of one layer with random weights; return these as the file has them."""
    rng = np.random.default_rng(0)
    tokens = ["<unk>", "<s>", "</s>", *(chr(code) for code in range(33, 127)), "th"]
    shapes = {
        "token_embd.weight": (len(tokens), HIDDEN), "output_norm.weight": (HIDDEN,),
        f"{BLOCK}attn_norm.weight": (HIDDEN,), f"{BLOCK}ffn_norm.weight": (HIDDEN,),
        **{f"{BLOCK}attn_{one}.weight": (HIDDEN, HIDDEN) for one in ("q", "k", "v", "output")},
        f"{BLOCK}ffn_gate.weight": (INNER, HIDDEN), f"{BLOCK}ffn_up.weight": (INNER, HIDDEN),
        f"{BLOCK}ffn_down.weight": (HIDDEN, INNER),
    }  # fmt: skip
    writer = GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["t h"])
    writer.add_token_types([3, 3, 3, *(1 for _ in tokens[3:])])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    kind = GGMLQuantizationType.Q8_0
    plain = {}
    for name, shape in shapes.items():
        weights = rng.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, weights)
            plain[name] = weights
        else:
            packed = quantize(weights, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
            plain[name] = dequantize(packed, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return plain


def test_weights_and_chat_template_come_out_as_they_went_in(tmp_path: Path) -> None:
    from safetensors.numpy import load_file
    from transformers import AutoTokenizer

    (tmp_path / "in").mkdir()
    plain = write(tmp_path / "in/tiny.gguf")
    out = convert(tmp_path / "in/tiny.gguf", tmp_path / "out")
    found = load_file(out / "model.safetensors")
    layer = "model.layers.0."
    for name, ours in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        (f"{BLOCK}attn_v.weight", f"{layer}self_attn.v_proj.weight"),
        (f"{BLOCK}ffn_down.weight", f"{layer}mlp.down_proj.weight"),
    ):
        np.testing.assert_allclose(found[ours], plain[name], rtol=1e-6)
    # GGUF has the halves of each head's rotation next to each other.
    query = plain[f"{BLOCK}attn_q.weight"].reshape(HEADS, -1, 2, HIDDEN).swapaxes(1, 2)
    np.testing.assert_allclose(
        found[f"{layer}self_attn.q_proj.weight"], query.reshape(HIDDEN, HIDDEN), rtol=1e-6
    )
    assert {str(one.dtype) for one in found.values()} == {"float32"}
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == TEMPLATE
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    assert convert(tmp_path / "in/tiny.gguf", out) == out
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp, "once is enough"


def test_a_file_that_is_not_there_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none.gguf")]) == 2
    assert capsys.readouterr().err == f"text2sql: {tmp_path}/none.gguf is no file.\n"
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"no model")
    assert main([str(bad)]) == 2
    assert f"{bad} cannot be read: " in capsys.readouterr().err
